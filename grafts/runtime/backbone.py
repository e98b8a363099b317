"""The backbone: one frozen, unmodified transformers decoder whose sites run the ops of the grafts that ride through
it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.grafts.runtime import attention as attention_module
from polygraft.grafts.runtime.feedforward import GatedFeedForward
from polygraft.grafts.runtime.linear import BLOCK, HEAD_BLOCK, FrozenLinear, padded
from polygraft.grafts.runtime.modules import SiteLinear, SiteNorm, Sublayer
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.grafts.runtime.route import Attention, RouteTable, Rows, routed
from polygraft.grafts.runtime.stacks import Resident, Stacks, weight
from polygraft.grafts.sites import BLOCK_SITE, FINAL_SITE, ModelShape, Site, module_path

FUSED = (("attn.q", "attn.k", "attn.v"), ("attn.o",), ("ffn.gate", "ffn.up"), ("ffn.down",))


class Backbone:
    """A decoder without gradients for its own weights. Build it with `Backbone.load`."""

    def __init__(
        self, model: nn.Module, shape: ModelShape, fingerprint: str, folder: Path, *, training: bool = False
    ) -> None:
        """Takes over `model`, a transformers LlamaForCausalLM in eval mode, and replaces the modules at its sites."""
        prepack, block = not training or model.dtype == torch.float32, BLOCK if training else None
        self.shape, self.fingerprint, self.folder = shape, fingerprint, folder
        self.decoder: nn.Module = model.model  # type: ignore[assignment]
        model.requires_grad_(False)
        fused = {
            id(self._module(Site(layer, n)).weight)
            for layer in range(shape.layers)
            for g in FUSED
            if len(g) > 1
            for n in g
        }
        for parameter in model.parameters():  # what is not copied by being fused, so that no mapped file stays open
            if id(parameter) not in fused:
                parameter.data = parameter.data.clone()
        self.linears: dict[Site, tuple[FrozenLinear, int]] = {}
        self.projections: dict[Site, SiteLinear] = {}
        for layer in range(shape.layers):
            self._adopt(layer, prepack=prepack, block=block)
        last = Site(shape.layers - 1, FINAL_SITE)
        norm = self._module(last)
        self._replace(last, SiteNorm(last, norm.weight, norm.variance_epsilon))  # type: ignore[arg-type]
        self.embedding: Tensor = self.decoder.embed_tokens.weight.detach()  # type: ignore[union-attr,operator]
        head: Tensor = model.lm_head.weight  # type: ignore[union-attr,assignment]
        self.head = FrozenLinear([head], [None], prepack=prepack, block=HEAD_BLOCK if training else None)
        self.dtype = self.embedding.dtype

    @staticmethod
    def load(folder: Path, dtype: torch.dtype | None = None, *, training: bool = False) -> Backbone:
        """From a local folder (config.json + safetensors); dtype None takes bf16 where the processor computes in it,
        else fp32.

        For `training`, products are blockwise, so that a row's numbers are its own to the last bit, and bf16 weights
        lie plain, since one copy serves both directions; else they are prepacked for the small steps of serving.
        """
        from transformers import AutoModelForCausalLM

        shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or best_dtype(), attn_implementation=attention_module.register(), use_safetensors=True
        )
        return Backbone(model.eval(), shape, fingerprint(folder), folder, training=training)  # type: ignore[no-untyped-call]

    def stacks(self, residents: Sequence[Resident], *, trainable: bool = False) -> Stacks:
        """Weight stacks of `residents` for this backbone's dtype and linears."""
        return Stacks.of(residents, self.shape, self.dtype, self.linears, trainable=trainable)

    def forward(self, rows: Rows, stacks: Stacks, attention: Attention) -> Tensor:
        """Hidden states after the final norm, [T, hidden], for T = len(rows).

        Rows are padded to the contract's grain inside; padded rows belong to no span and no sequence and never come
        back.
        """
        extra = padded(len(rows)) - len(rows)
        ids, positions = (F.pad(x, (0, extra)).unsqueeze(0) for x in (rows.ids, rows.positions))
        with routed(RouteTable(rows.spans, stacks, attention, rows.dropout_keys)):
            embedded = F.embedding(ids, self.embedding)
            if stacks.trainable and torch.is_grad_enabled():
                embedded.requires_grad_()
            hidden: Tensor = self.decoder(
                inputs_embeds=embedded, position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden[0, : len(rows)]

    def weight(self, site: Site) -> Tensor:
        """W [out, in] of a projection, in float32 or wider."""
        return weight(self.linears, site)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, vocab] in float32 (float64 stays); N is padded to the contract's grain for the product."""
        count = len(hidden_ND)
        product = self.head.product(F.pad(hidden_ND, (0, 0, 0, padded(count) - count)))[:count]
        return product.to(torch.promote_types(product.dtype, torch.float32))

    def _adopt(self, layer: int, *, prepack: bool, block: int | None) -> None:
        """Replace the modules of one layer, innermost first."""
        from transformers.activations import SiLUActivation

        for names in FUSED:
            modules = [self._module(Site(layer, name)) for name in names]
            linear = FrozenLinear(
                [m.weight for m in modules],  # type: ignore[misc]
                [m.bias for m in modules],  # type: ignore[misc]
                prepack=prepack,
                block=block,
            )
            group = [Site(layer, name) for name in names]
            for member, site in enumerate(group):
                self.linears[site] = (linear, member)
                self.projections[site] = SiteLinear(group, linear, member)
                self._replace(site, self.projections[site])
        for name in ("norm.1", "norm.2"):
            site = Site(layer, name)
            norm = self._module(site)
            self._replace(site, SiteNorm(site, norm.weight, norm.variance_epsilon))  # type: ignore[arg-type]
        for name in ("attn.out", "ffn.out"):
            site = Site(layer, name)
            inner = self._module(site)
            if isinstance(getattr(inner, "act_fn", None), SiLUActivation):
                inner = GatedFeedForward(inner.gate_proj, inner.up_proj, inner.down_proj)  # type: ignore[arg-type]
            self._replace(site, Sublayer(site, inner))
        whole = Site(layer, BLOCK_SITE)
        self._replace(whole, Sublayer(whole, self._module(whole)))

    def _module(self, site: Site) -> nn.Module:
        return self.decoder.get_submodule(module_path(site, self.shape.arch))

    def _replace(self, site: Site, module: nn.Module) -> None:
        parent, _, child = module_path(site, self.shape.arch).rpartition(".")
        setattr(self.decoder.get_submodule(parent), child, module)


def best_dtype() -> torch.dtype:
    """bf16 where the processor multiplies in it, else float32."""
    return (
        torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    )

"""The backbone: one frozen, unmodified transformers model whose sites run the ops of the grafts that ride through
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.runtime import attention as attention_module
from polygraft.grafts.runtime.adopt import Adoption, head_transform
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.checked import check_loading, model_class, read_config
from polygraft.grafts.runtime.embedding import embed
from polygraft.grafts.runtime.generated import check_inputs
from polygraft.grafts.runtime.layer_plan import LayerPlan
from polygraft.grafts.runtime.linears.choose import BLOCK, HEAD_BLOCK, frozen_linear
from polygraft.grafts.runtime.padding import padded
from polygraft.grafts.runtime.patches import Patches
from polygraft.grafts.runtime.pretrained import Quantise, fingerprint
from polygraft.grafts.runtime.recorder import Recorder
from polygraft.grafts.runtime.route import Attention, Entry, RouteTable, Rows, kept_work_lists, routed
from polygraft.grafts.runtime.stacks import Resident, Stacks, weight
from polygraft.grafts.sites import ModelShape, Site
from polygraft.grafts.spec import SpecError
from polygraft.kernels.kv import whole
from polygraft.kernels.kv.cost import SCORE_BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone:
    """A model without gradients for its own weights. Build it with `Backbone.load`."""

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        fingerprint: str,
        folder: Path,
        *,
        training: bool = False,
        quantise: Quantise | None = None,
    ) -> None:
        """Takes over `model`, a transformers model in eval mode, and replaces the modules at its sites."""
        self.shape, self.fingerprint, self.folder, self.quantise = shape, fingerprint, folder, quantise
        prepack, block = not training or model.dtype == torch.float32, BLOCK if training else None
        table = architecture(shape.arch)
        model.requires_grad_(False)
        embed: nn.Module = model.get_input_embeddings()
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if table.head is not None and hasattr(model, table.head):
            head = model.get_submodule(table.head)
        self.base: nn.Module = model if head is None else model.get_submodule(table.backbone)
        if head is None:
            # It reads the first row of a batch, and nobody reads it.
            self.base.pooler = None  # type: ignore[assignment]
        adoption = Adoption(self.base, shape, prepack=prepack, block=block, quantise=quantise)
        prefix = f"{table.backbone}." if head is not None and table.backbone else ""
        copied = {prefix + name for name in adoption.fused()}
        for name, parameter in model.named_parameters():
            if name not in copied:  # by being fused: so no mapped file stays open
                parameter.data = parameter.data.clone()
        adoption.run()
        # An encoder and a decoder are called one after the other, since their rows belong to different sequences.
        self._encoder: nn.Module | None = self.base.get_submodule("encoder") if table.encoder is not None else None
        self._decoder: nn.Module = self.base if self._encoder is None else self.base.get_submodule("decoder")
        scaled = head is not None and getattr(model.config, "scale_decoder_outputs", False)
        self._scale: float | None = shape.hidden**-0.5 if scaled else None  # T5's, before its head
        self.linears, self.projections = adoption.linears, adoption.projections
        self._plan = LayerPlan.of(self.base, shape, adoption.projections)
        self._patches: Patches | None = Patches.of(self.base) if table.patches else None
        self.embedding = embed.get_parameter("weight").detach() if self._patches is None else self._patches.bare
        self._factor: Tensor | None = getattr(embed, "embed_scale", None)  # Gemma's
        self._first_position = table.first_position
        self._transform = head_transform(model, table, prepack=prepack, block=block) if head is not None else None
        # A model without a head has the identity for one: its logits are its hidden states.
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        rows = (
            torch.eye(shape.hidden, dtype=self.dtype, device=self.device)
            if head is None
            else head.get_parameter("weight")
        )
        bias = getattr(head, "bias", None)
        self.head = frozen_linear([rows], [bias], prepack=prepack, block=HEAD_BLOCK if training else None)
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2's

    @staticmethod
    def load(
        folder: Path,
        dtype: torch.dtype | None = None,
        *,
        training: bool = False,
        quantise: Quantise | None = None,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """From a local folder (config.json + safetensors), read on the CPU, to a device; dtype None takes bf16 where
        that computes in it, else fp32.

        For `training`, products are blockwise, so that a row's numbers are its own to the last bit, and bf16 weights
        lie plain, since one copy serves both directions; else they are prepacked for the small steps of serving. With
        `quantise` the projections of the layers are in NF4 (QLoRA, LoftQ), and the backbone is another one by its
        fingerprint. Raises BackboneError where the files do not hold exactly the config's tensors.
        """
        config = read_config(folder)
        shape = ModelShape.from_config(config)
        model, found = model_class(shape, config).from_pretrained(
            folder,
            dtype=dtype or best_dtype(device),
            attn_implementation=attention_module.register(),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_loading(found, shape, folder)
        identity = fingerprint(folder, quantise)
        return Backbone(model.eval().to(device), shape, identity, folder, training=training, quantise=quantise)

    def stacks(self, residents: Sequence[Resident], *, trainable: bool = False) -> Stacks:
        """Weight stacks of `residents`, wherever their tensors lie, for this backbone's device, dtype and linears."""
        made_on = self.dtype, self.linears, self.run_from_layer
        return Stacks.of(residents, *made_on, device=self.device, trainable=trainable)

    def forward(self, rows: Rows, stacks: Stacks, attention: Attention) -> Tensor:
        """What the head multiplies, [T, hidden], for T = len(rows): hidden states after the final norm, in an encoder
        after the head's transform. The rows may lie anywhere; what is returned lies on the backbone's device.

        Rows are padded to the contract's grain inside; padded rows belong to no span and no sequence and never come
        back.
        """
        return self._hidden(rows, stacks, attention, plain=False)

    def states(self, rows: Rows, stacks: Stacks, attention: Attention) -> Tensor:
        """The same without the head's transform: hidden states, which a classifier reads."""
        return self._hidden(rows, stacks, attention, plain=True)

    def _hidden(self, rows: Rows, stacks: Stacks, attention: Attention, *, plain: bool) -> Tensor:
        check_inputs(rows, stacks)
        rows, lists = rows.to(self.device), kept_work_lists(rows, stacks)
        if self._encoder is None:
            entry = None
            if rows.entry_layer is not None and rows.inputs_embeds is not None:
                entry = Entry(rows.entry_layer, rows.inputs_embeds)
            keys = rows.dropout_keys
            route = RouteTable(rows.spans, stacks, attention, keys, None, rows.inputs, entry, work_lists=lists)
            learns = stacks.trainable and torch.is_grad_enabled() and bool(rows.spans)
            lowest = route.lowest_layer() if learns else 0
            hidden = self._run(self.base, rows, replace(route, lowest=lowest or 0), plain=plain)
            if lowest is None:  # nobody's backward has anywhere to go
                hidden = hidden.detach()
        else:
            if rows.source is None or not isinstance(attention, WholeSequences):
                raise SpecError(f"rows: {self.shape.arch} reads whole sequences, each with a source")
            read, attends = rows.source, attention.of_source()
            source = RouteTable(read.spans, stacks, attends, read.dropout_keys, inputs=read.inputs)
            states = self._run(self._encoder, read, source)
            route = RouteTable(rows.spans, stacks, attention, rows.dropout_keys, source, rows.inputs, work_lists=lists)
            hidden = self._run(self._decoder, rows, route, encoder_hidden_states=states[None])
        if self._scale is not None:
            hidden = hidden * self._scale
        return hidden[: len(rows)]

    def _run(self, module: nn.Module, rows: Rows, route: RouteTable, *, plain: bool = False, **more: Tensor) -> Tensor:
        """Last states of the rows and of their padding."""
        full, taken = rows.padded(padded(len(rows))), "inputs_embeds" if self._patches is None else "pixel_values"
        with routed(route):
            embedded = embed(full, self.embedding, self._factor, route)
            planned = None if self._plan is None else self._plan.run(embedded, full.positions, route)
            if planned is not None:
                return planned
            more[taken] = embedded[None]
            hidden: Tensor = module(
                position_ids=full.positions[None] + self._first_position, use_cache=False, **more
            ).last_hidden_state[0]
            return hidden if self._transform is None or plain else self._transform(hidden)

    def patches(self, pixels: Tensor) -> Tensor:
        """The rows [b, n, hidden] of images [b, channels, height, width], a class token first: `Rows.inputs_embeds`."""
        if self._patches is None:
            raise SpecError(f"pixels: {self.shape.arch} reads tokens and no images")
        return self._patches.rows(pixels.to(self.device))

    def unquantised(self) -> Backbone:
        """The model as it lies in its folder, in this one's dtype: another copy, to be dropped soon."""
        return Backbone.load(self.folder, self.dtype, training=True, device=self.device)

    def weight(self, site: Site) -> Tensor:
        """W [out, in] of a projection, in float32 or wider."""
        return weight(self.linears, site)

    def run_from_layer(self, rows_PD: Tensor, first: int) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values [P, kv_width] that rows entering before layer `first` leave there and in all later ones, with
        positions 0 to P - 1 and nothing else to see; differentiable, in the rows' dtype."""
        if not self.shape.causal:
            raise SpecError(f"backbone: {self.shape.sees}; no rows run through it by themselves")
        ids = torch.zeros(len(rows_PD), dtype=torch.long, device=rows_PD.device)
        positions = torch.arange(len(rows_PD), device=rows_PD.device)
        rows = Rows(ids, positions, (), inputs_embeds=rows_PD.to(self.dtype), entry_layer=first)
        left = self.recorded(rows).of_rows(len(rows))
        # Copied, so that they do not hold the projections of the whole input that they are a part of.
        kept = {layer: [x.to(rows_PD.dtype, copy=True) for x in both] for layer, both in left.items()}
        return {layer: (k, v) for layer, (k, v) in kept.items()}

    def recorded(self, rows: Rows) -> Recorder:
        """What the attention of every layer is given of the rows of one sequence, without any graft."""
        own = ((0, len(rows)),)
        attention = Recorder(own, self.shape, own)
        self.forward(replace(rows, source=rows), self.stacks(()), attention)
        return attention

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, vocab] in float32 (float64 stays), capped where the model caps them; N is padded to the contract's grain
        for the product."""
        count = len(hidden_ND)
        product = self.head.output(F.pad(hidden_ND, (0, 0, 0, padded(count) - count)))[:count]
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)

    @property
    def score_block(self) -> int | None:
        """Queries whose scores attention of whole sequences has at a time; None: all of them."""
        config = self.base.config
        plain = self.shape.causal and getattr(config, "attn_logit_softcapping", None) is None
        return SCORE_BLOCK if plain and whole.computes_heads(self.dtype, self.device, self.shape.head_dim) else None

    def softcap_backward(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the head's product from that of these logits."""
        return slope if self.cap is None else slope * (1 - (logits.detach() / self.cap).square())


def best_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bf16 where the device multiplies in it, else float32."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32

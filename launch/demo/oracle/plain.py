"""The reference backbone: transformers' own model, without a line of ours, in float32 or purely in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from polygraft.launch.demo.oracle.uniform import uniform

SHARED = "shared"
HEADS: Mapping[str, type[_BaseAutoModelClass]] = {  # a decoder's where nothing stands
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "vit": AutoModelForImageClassification,
    "t5": AutoModelForSeq2SeqLM,
}
# Where an oracle finds our sites, on every architecture (uniform.py).
MODULES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.out": "self_attn",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.out": "mlp",
    "cross.q": "cross_attn.cross_q",
    "cross.k": "cross_attn.cross_k",
    "cross.v": "cross_attn.cross_v",
    "cross.o": "cross_attn.cross_o",
    "cross.out": "cross_attn",
    "norm.1": "input_layernorm",
    "norm.2": "post_attention_layernorm",
    "norm.cross": "cross_attn_layernorm",
    "block.out": "",
}
OUTSIDE = {"norm.final": "model.norm", "embed": "model.embed_tokens"}  # outside the layers


@dataclass(frozen=True, slots=True)
class Place:
    """Where an oracle keeps one of our tensors: `view` shows the parameter (or its gradient) in our shape."""

    parameter: Tensor
    view: Callable[[Tensor], Tensor] = lambda t: t


@dataclass(frozen=True, slots=True)
class Oracle:
    """A solo model of one graft: `logits` maps token ids [T] to [T, vocab]; `places` are our tensors' names."""

    logits: Callable[[Tensor], Tensor]
    places: Mapping[str, Place]

    def gradients(self) -> dict[str, Tensor]:
        """By our names and in our shapes, summed over the backwards so far."""
        found = {}
        for name, place in self.places.items():
            assert place.parameter.grad is not None, f"no gradient reached {name}"
            found[name] = place.view(place.parameter.grad).clone()
        return found


def plain_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Eager attention; in float64 with SDPA and another RMSNorm, since transformers' own compute in float32 there."""
    wide = dtype == torch.float64
    kind = AutoConfig.from_pretrained(folder).model_type
    model: PreTrainedModel = HEADS.get(kind, AutoModelForCausalLM).from_pretrained(
        folder, dtype=dtype, attn_implementation=_float64() if wide else "eager"
    )
    for module in model.modules() if wide else ():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = MethodType(_rms_norm, module)
    model.requires_grad_(False)
    model.train(False)
    return model


def plain_llama(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The same with its parts where Llama has them, whatever the architecture."""
    return uniform(plain_model(folder, dtype))


def read(model: nn.Module, ids: Tensor, **inputs: object) -> Tensor:
    """Logits of what `ids` [n] mean to the model: of these tokens, [n, vocab], after an encoder that there is has read
    their `source`; of one image, [1, classes]."""
    if model.config.model_type == "vit":  # type: ignore[union-attr]
        found: Tensor = model(pixel_values=_image(model, ids)[None], **inputs).logits
        return found
    if model.config.model_type == "t5":  # type: ignore[union-attr]
        inputs = {"input_ids": source(ids)[None], "decoder_input_ids": ids[None], **inputs}
        answer: Tensor = model(**{**inputs, "use_cache": False}).logits[0]
        return answer
    text: Tensor = model(**{"input_ids": ids[None], "use_cache": False, **inputs}).logits[0, -len(ids) :]
    return text


def read_rows(model: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    """The same where `rows` [p + n, hidden] stand for what `embedded` gives: p virtual ones, then those."""
    count = len(embedded(model, ids))
    if model.config.model_type == "vit":  # type: ignore[union-attr]
        embeddings = model.get_submodule("vit.embeddings")
        # A patch's place is in its row, so that the class token may stand first, where the class reads it.
        handle = embeddings.register_forward_hook(lambda *_: rows.roll(count - len(rows), 0)[None])
        with handle:
            return read(model, ids)
    if model.config.model_type == "t5":  # type: ignore[union-attr]
        return read(model, ids, input_ids=None, inputs_embeds=rows[None])
    found: Tensor = model(inputs_embeds=rows[None], use_cache=False).logits[0, -count:]
    return found


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """The rows [n, hidden] that the model's first layer reads of ids or of their image."""
    if model.config.model_type == "vit":  # type: ignore[union-attr]
        rows: Tensor = model.get_submodule("vit.embeddings")(_image(model, ids)[None])[0]
        return rows
    ids = source(ids) if model.config.model_type == "t5" else ids  # type: ignore[union-attr]
    return model.get_input_embeddings()(ids)  # type: ignore[no-any-return,operator]


def source(ids: Tensor) -> Tensor:
    """What an encoder reads before the decoder reads `ids`: them backwards, and some again."""
    return torch.cat([ids.flip(0), ids[:3]])


def image(config: PreTrainedConfig, ids: Tensor) -> Tensor:
    """Noise [channels, height, width] that the ids decide."""
    shape = (config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(ids.sum())))


def _image(model: nn.Module, ids: Tensor) -> Tensor:
    return image(model.config, ids).to(model.get_parameter("vit.embeddings.cls_token").dtype)  # type: ignore[arg-type]


def module_of(layer: int, site: str) -> str:
    """Path of a site's module in `plain_llama`."""
    return OUTSIDE.get(site) or f"model.layers.{layer}.{MODULES[site]}".rstrip(".")


def split(name: str) -> tuple[int, int, str, str]:
    """(slot, layer, site, part) of a tensor's name such as `0.1.attn.q.A`; (0, -1, SHARED, A) of `0.shared.A`."""
    slot, layer, *site, part = name.split(".")
    return (int(slot), -1, SHARED, part) if layer == SHARED else (int(slot), int(layer), ".".join(site), part)


def _float64() -> str:
    """transformers' SDPA under a name of its own, since Gemma 2 does not list it; where that caps scores, which SDPA
    cannot, cap tanh(score / cap) before the mask (Gemma Team 2024, arXiv 2408.00118, section 2)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
    ) -> tuple[Tensor, None]:
        cap, scaling = options.pop("softcap", None), options.get("scaling")
        if not isinstance(cap, float):
            return sdpa(module, query, key, value, mask, **options)  # type: ignore[no-any-return]
        assert mask is not None and isinstance(scaling, float)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = cap * torch.tanh(scaling * query @ key.transpose(2, 3) / cap) + mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("float64", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("float64", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return "float64"


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    eps: float = getattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon")
    weight = norm.get_parameter("weight") + (1 if type(norm).__name__.startswith("Gemma") else 0)
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

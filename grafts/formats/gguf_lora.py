"""A LoRA as the GGUF file that llama.cpp adds to a model (`--lora`), as its convert_lora_to_gguf.py writes it.

y += (alpha / r) B A x under the names of the model's own tensors, `blk.0.attn_q.weight.lora_a` [r, in] and `.lora_b`
[out, r]. One alpha goes for all, so that where scales differ they are in B. Llama's q and k have their rows in another
order there: of each head the two halves, which rotate together, lie interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.check import FormatError, check, refuse_head
from polygraft.grafts.formats.peft_modules import path
from polygraft.grafts.formats.plain import plain
from polygraft.grafts.sites import ModelShape, Site
from polygraft.grafts.spec import Branch, GraftSpec
from polygraft.kernels.common.atomic import whole_file

# llama.cpp's architecture of a model_type whose projections it keeps whole.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "phi": "phi2",
}


def export(target: Path, graft: BoundGraft, values: Mapping[str, Tensor], *, name: str | None = None) -> None:
    """Write the graft, a sum of linear branches, to the new file `target`, float32; whole or not at all.

    Raises FormatError for a graft that is no LoRA (`to_lora` makes one of it), or a model that llama.cpp keeps
    otherwise.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise FormatError("gguf: the package is not installed; it comes with polygraft[embedded]") from None
    if target.exists():
        raise FormatError(f"{target}: exists already; name a file that does not")
    shape = graft.shape
    kind = _ARCHITECTURES.get(shape.arch)
    if kind is None:
        raise FormatError(f"gguf: {shape.arch} is not kept as here; choices: {', '.join(_ARCHITECTURES)}")
    refuse_head(graft)
    check(graft, values)
    lora, tensors = plain(graft, values) or (graft, None)
    if tensors is None or not all(isinstance(slot, Branch) for slot in lora.spec.slots):
        raise FormatError(f"gguf: {graft.spec.method!r} is not exactly a LoRA; give a rank or an energy")
    (model,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == kind)
    names = gguf.get_tensor_name_map(model, shape.layers)
    scales = {index: slot.scale for index, slot in enumerate(lora.spec.slots) if isinstance(slot, Branch)}
    alpha = _alpha(lora.spec)
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name or target.stem)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for index, site in lora.sites:
            A, B = tensors[f"{index}.{site}.A"].float(), tensors[f"{index}.{site}.B"].double()
            factor = scales[index] * len(A) / alpha
            B = (B if factor == 1 else B * factor).float().T
            known = names.get_name(f"{path(site, shape)}.weight", try_suffixes=(".weight",))
            assert known is not None and not architecture(shape.arch).transposed
            writer.add_tensor(f"{known}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{known}.lora_b", _interleaved(B, site, shape, kind).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _alpha(lora: GraftSpec) -> float:
    """The first term's, as a float32 holds it, or its rank where that is 0."""
    (first, *_) = (slot for slot in lora.slots if isinstance(slot, Branch))
    return float(torch.tensor(first.scale * first.rank, dtype=torch.float32)) or float(first.rank)


def _interleaved(B: Tensor, site: Site, shape: ModelShape, kind: str) -> Tensor:
    """Rows (head, half, i) as (head, i, half)."""
    if kind != "llama" or site.name not in ("attn.q", "attn.k"):
        return B
    heads = shape.heads if site.name == "attn.q" else shape.kv_heads
    return B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)

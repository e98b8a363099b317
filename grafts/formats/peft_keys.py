"""The keys of a PEFT file as its save_pretrained writes them, from the other spellings that people's files have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.sites import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

ROOT = "base_model.model."
# What stands in keys beside the modules: torch.compile's wrapper, and the adapter's name in a model's own state.
_BESIDE = ("_orig_mod", "default")
# Where models of text and images keep the text's, now and in earlier transformers.
FRONTS = ("model.language_model.", "language_model.model.", "language_model.")


def usual(stored: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The tensors by PEFT's keys; raises FormatError where two of the file mean one."""
    found: dict[str, Tensor] = {}
    for key, value in stored.items():
        name = _usual(key, shape)
        if name in found:
            raise FormatError(f"{key}: is in the file twice, in two spellings")
        found[name] = value
    return found


def _usual(key: str, shape: ModelShape) -> str:
    table = architecture(shape.arch)
    name = ".".join(part for part in key.split(".") if part not in _BESIDE)
    if name.startswith("base_model.") and not name.startswith(ROOT):
        return name  # what all modules of a method share
    rest = name.removeprefix(ROOT)
    if "." not in rest:
        return name
    if table.backbone == "model":
        front = next((one for one in FRONTS if rest.startswith(one)), None)
        if front is not None:
            rest = rest.removeprefix(front)
            rest = rest if rest.startswith("lm_head.") else f"model.{rest}"
    if table.backbone and rest.startswith((f"{table.layers}.", f"{table.embedding}.")):
        rest = f"{table.backbone}.{rest}"
    return ROOT + rest

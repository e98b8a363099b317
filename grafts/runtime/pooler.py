"""BERT's pooler, which only a classifier reads: its numbers as the backbone's files have them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from polygraft.grafts.spec import SpecError

_END = "pooler.dense."


def pooler(folder: Path) -> tuple[Tensor, Tensor]:
    """P [hidden, hidden] and p [hidden], float32 or wider. Raises SpecError where the files have none, as those of a
    model that was saved with its head for masked words."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if _END in f".{name}"]  # noqa: SIM118 - not a mapping
            found |= {name.rpartition(".")[2]: file.get_tensor(name) for name in names}
    if found.keys() != {"weight", "bias"}:
        raise SpecError(
            "head: the backbone's files have no pooler, which BERT's classifier reads; give a model with one"
        )
    weight, bias = (
        found[name].to(torch.promote_types(found[name].dtype, torch.float32)) for name in ("weight", "bias")
    )
    return weight, bias

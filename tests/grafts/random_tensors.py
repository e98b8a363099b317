"""Values to compare a graft at, whatever the method; without PEFT, whose import takes seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft


def random_tensors(graft: BoundGraft, seed: int) -> dict[str, Tensor]:
    """Tensors of a graft that has been trained: none at its starting value, float64 that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    centre = {"g": 1.0, "m": 0.8}  # 0.8 is about the row norm of the tiny model's weights
    return {
        t.name: (centre.get(t.part, 0.0) + 0.15 * torch.randn(t.shape, generator=generator)).double()
        for t in graft.tensors
    }

"""The slab of one job: master weights, gradient and moments of its graft, each one contiguous float32 tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polygraft.grafts.runtime.stacks import Piece
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sizes import tensors
from polygraft.grafts.spec import GraftSpec


class Slab:
    """Job-major memory: to save, clone or move a job is to copy three tensors. `views` are the master's tensors by
    name."""

    def __init__(self, spec: GraftSpec, shape: ModelShape, dtype: torch.dtype = torch.float32) -> None:
        layout = tensors(spec, shape)
        self.master, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(sum(t.numel for t in layout), dtype=dtype) for _ in range(4)
        )
        sizes = [t.numel for t in layout]
        self.views = {t.name: v.view(t.shape) for t, v in zip(layout, self.master.split_with_sizes(sizes))}
        self._grads = {t.name: v for t, v in zip(layout, self.grad.split_with_sizes(sizes))}

    def fill(self, start: Mapping[str, Tensor]) -> None:
        """Set the master weights from tensors by name."""
        for name, view in self.views.items():
            view.copy_(start[name])

    def collect(self, pieces: Sequence[Piece]) -> None:
        """Add the gradients that a backward left in the stacks' rows of this job."""
        found = [(self._grads[piece.tensor.name], piece.gradient()) for piece in pieces]
        pairs = [(into, part.reshape(-1)) for into, part in found if part is not None]
        if pairs:
            torch._foreach_add_([into for into, _ in pairs], [part for _, part in pairs])

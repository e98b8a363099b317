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
    name. The gradient exists only from the first `collect` of a step to `clear`, so that it never adds to a forward's
    activations.
    """

    def __init__(self, spec: GraftSpec, shape: ModelShape, dtype: torch.dtype = torch.float32) -> None:
        layout = tensors(spec, shape)
        self._names, self._sizes = [t.name for t in layout], [t.numel for t in layout]
        self.master, self.exp_avg, self.exp_avg_sq = (torch.zeros(sum(self._sizes), dtype=dtype) for _ in range(3))
        pieces = self.master.split_with_sizes(self._sizes)
        self.views = {t.name: piece.view(t.shape) for t, piece in zip(layout, pieces, strict=True)}
        self.grad: Tensor | None = None

    def fill(self, start: Mapping[str, Tensor]) -> None:
        """Set the master weights from tensors by name."""
        for name, view in self.views.items():
            view.copy_(start[name])

    def collect(self, pieces: Sequence[Piece]) -> None:
        """Add the gradients that a backward left in the stacks' rows of this job."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.master)
        rows = dict(zip(self._names, self.grad.split_with_sizes(self._sizes), strict=True))
        found = [(rows[piece.tensor.name], piece.gradient()) for piece in pieces]
        pairs = [(into, part.reshape(-1)) for into, part in found if part is not None]
        if pairs:
            torch._foreach_add_([into for into, _ in pairs], [part for _, part in pairs])

    def clear(self) -> None:
        """Forget the collected gradient."""
        self.grad = None

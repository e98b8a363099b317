"""The slab of one job: master weights, gradient and moments of its graft, each one contiguous float32 tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        self._sizes = [t.numel for t in layout]
        self.master, self.exp_avg, self.exp_avg_sq = (torch.zeros(sum(self._sizes), dtype=dtype) for _ in range(3))
        pieces = self.master.split_with_sizes(self._sizes)
        self.views = {t.name: piece.view(t.shape) for t, piece in zip(layout, pieces, strict=True)}
        self.grad: Tensor | None = None

    def fill(self, start: Mapping[str, Tensor]) -> None:
        """Set the master weights from tensors by name."""
        for name, view in self.views.items():
            view.copy_(start[name])

    def collect(self, parts: Sequence[Tensor | None]) -> None:
        """Add the gradient that a backward left for this job, tensor by tensor as `Stacks.gradients` has them."""
        whole = [p if p is not None else self.master.new_zeros(n) for p, n in zip(parts, self._sizes, strict=True)]
        found = torch.cat(whole).to(self.master.dtype)  # joined before it is widened: two passes in place of hundreds
        self.grad = found if self.grad is None else self.grad.add_(found)

    def clear(self) -> None:
        """Forget the collected gradient."""
        self.grad = None

"""The slab of one job: master weights, gradient and moments of its graft, each one contiguous float32 tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.kernels.copies.op import join


class Slab:
    """Job-major memory: to save, clone or move a job is to copy three tensors, and those that are not trained.

    `tensors` are all of the graft's by name, the trained ones being views of the master. The gradient exists only from
    the first `collect` of a step to `clear`, so that it never adds to a forward's activations.
    """

    def __init__(
        self, graft: BoundGraft, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        layout, self.trained = graft.tensors, graft.trained
        self._sizes = [t.numel for t in self.trained]
        parts = (torch.zeros(graft.parameters, dtype=dtype, device=device) for _ in range(3))
        self.master, self.exp_avg, self.exp_avg_sq = parts
        self.frozen = {t.name: torch.zeros(t.shape, dtype=dtype, device=device) for t in layout if not t.trained}
        self.views = self._by_name(self.master)
        self._names = tuple(t.name for t in layout)
        self.tensors = self.all_of(self.master)
        self.grad: Tensor | None = None

    def fill(self, start: Mapping[str, Tensor]) -> None:
        """Set all tensors by name."""
        for name, view in self.tensors.items():
            view.copy_(start[name])

    def copy(self, other: Slab) -> None:
        """Become what another slab of the same graft is, its moments included."""
        for mine, its in (
            (self.master, other.master),
            (self.exp_avg, other.exp_avg),
            (self.exp_avg_sq, other.exp_avg_sq),
        ):
            mine.copy_(its)
        for name, value in self.frozen.items():
            value.copy_(other.frozen[name])

    def all_of(self, flat: Tensor) -> dict[str, Tensor]:
        """All of the graft's tensors by name, the trained ones being views of a flat tensor in the master's place."""
        views = self._by_name(flat)
        return {name: views[name] if name in views else self.frozen[name] for name in self._names}

    def joined(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The gradient that a backward left for this job, trained tensor by tensor, as one flat tensor."""
        whole = (torch.zeros_like if any(part is None for part in parts) else torch.empty_like)(self.master)
        join(whole, parts, self._sizes)
        return whole

    def collect(self, gradient: Tensor) -> None:
        """Add a flat gradient to the step's; it may be changed later."""
        self.grad = gradient if self.grad is None else self.grad.add_(gradient)

    def gradients(self) -> dict[str, Tensor]:
        """Views of the collected gradient by name."""
        assert self.grad is not None, "no gradient was collected"
        return self._by_name(self.grad)

    def clear(self) -> None:
        """Forget the collected gradient."""
        self.grad = None

    def forget(self) -> None:
        """Set the moments back to 0, for an optimiser that starts anew."""
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """The trained tensors' shares of a flat tensor, in order."""
        return flat.split_with_sizes(self._sizes)

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return {t.name: piece.view(t.shape) for t, piece in zip(self.trained, self.split(flat), strict=True)}

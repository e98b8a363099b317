"""A job's classifier in a forward: logits, losses and gradients of its own rows, apart from everybody else's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.classifier import label_logits
from polygraft.grafts.sizes import TensorSpec


class ClassHead:
    """Copies of a head's tensors, the trained ones leaves that collect a gradient. Its rows are those of one job's
    micro-batch, whose split is fixed, so what it computes is a function of the job alone."""

    def __init__(self, layout: tuple[TensorSpec, ...], tensors: Mapping[str, Tensor]) -> None:
        """`layout` are the head's tensors in the slab's order."""
        self._parts = {t.part: tensors[t.name].detach().clone().requires_grad_(t.trained) for t in layout}
        self._trained = [t.part for t in layout if t.trained]

    def logits(self, rows_ND: Tensor) -> Tensor:
        """[N, classes] of hidden states [N, hidden], in the head's dtype, float32 or wider."""
        return label_logits(self._parts, rows_ND)

    def losses_and_gradient(self, rows_ND: Tensor, labels_N: Tensor, factors_N: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(label) of every row, [N], and d(sum of factor * loss) / d rows [N, hidden]; the head's own gradient
        stays in its leaves."""
        for part in self._trained:
            self._parts[part].grad = None
        with torch.enable_grad():
            rows = rows_ND.detach().clone().requires_grad_()  # where they lie among others' is not to be seen
            losses = F.cross_entropy(self.logits(rows), labels_N, reduction="none")
            (losses * factors_N.to(losses.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None
        return losses.detach(), rows.grad

    def judged(self, rows_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, and the likeliest label of every row, of several equal ones the first. No gradient."""
        logits = self.logits(rows_ND)
        return F.cross_entropy(logits, labels_N, reduction="none"), logits.argmax(dim=1)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of the trained tensors in the slab's order, flat, after `losses_and_gradient`."""
        found = (self._parts[part].grad for part in self._trained)
        return [None if gradient is None else gradient.reshape(-1) for gradient in found]

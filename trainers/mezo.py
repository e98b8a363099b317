"""Zeroth-order steps (MeZO; Malladi et al. 2023, arXiv 2305.17333, algorithm 1): a gradient from two losses and a
direction that is drawn again, never stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.grafts.runtime.slab import Slab
from polygraft.kernels.common.noise import normal


class Perturbation:
    """The two points theta + eps z and theta - eps z around a job's tensors, by their names."""

    def __init__(self, slab: Slab, eps: float) -> None:
        self._slab, self.eps = slab, eps
        self._points = torch.empty_like(slab.master), torch.empty_like(slab.master)

    @property
    def tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self._slab.all_of(self._points[0]), self._slab.all_of(self._points[1])

    def move(self, key: int) -> None:
        """To the points of the step with this key, from where the tensors are now."""
        z, master = self._direction(key), self._slab.master
        for point, distance in zip(self._points, (self.eps, -self.eps), strict=True):
            torch.add(master, z, alpha=distance, out=point)

    def collect(self, key: int, difference: float) -> None:
        """Leave (L(theta + eps z) - L(theta - eps z)) / (2 eps) z as the slab's gradient."""
        self._slab.collect(self._direction(key).mul_(difference / (2 * self.eps)))

    def _direction(self, key: int) -> Tensor:
        master = self._slab.master
        return normal(key, len(master), master.dtype, master.device)

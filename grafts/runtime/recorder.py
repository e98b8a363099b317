"""An attention that keeps the keys and values it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.route import RouteTable
from polygraft.kernels.kv.scores import Scores


@dataclass(frozen=True)
class Recorder(WholeSequences):
    """It attends as usual; `kept` are every layer's keys and values [T, kv_width], rotary applied."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        self.kept[layer] = (k, v)
        return super().__call__(layer, q, k, v, route=route, scores=scores)

    def of_rows(self, count: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Without those of padded rows."""
        return {layer: (k[:count], v[:count]) for layer, (k, v) in self.kept.items()}

"""What rows of one sequence leave in the bare backbone, or read there, when they run through it by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.route import RouteTable, Rows
from polygraft.grafts.sites import BLOCK_SITE, Site, module_path
from polygraft.kernels.kv.scores import Scores

if TYPE_CHECKING:
    from polygraft.grafts.runtime.backbone import Backbone


@dataclass(frozen=True)
class _Recorder(WholeSequences):
    """An attention that keeps every layer's keys and values and attends as usual."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        self.kept[layer] = (k, v)
        return super().__call__(layer, q, k, v, route=route, scores=scores)


def keys_and_values(backbone: Backbone, rows: Rows) -> dict[int, tuple[Tensor, Tensor]]:
    """Those of the rows [T, kv_width] in each layer that they pass, rotary applied; differentiable in
    `inputs_embeds`."""
    attention = _run(backbone, rows)
    return {layer: (k[: len(rows)], v[: len(rows)]) for layer, (k, v) in attention.kept.items()}


def states(backbone: Backbone, rows: Rows, layer: int) -> Tensor:
    """What a layer reads of the rows, [T, hidden]."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][0, : len(rows)])

    module = backbone.base.get_submodule(module_path(Site(layer, BLOCK_SITE), backbone.shape))
    with module.register_forward_pre_hook(note):
        _run(backbone, rows)
    return seen[0]


def _run(backbone: Backbone, rows: Rows) -> _Recorder:
    own = ((0, len(rows)),)
    attention = _Recorder(own, backbone.shape, own)
    backbone.forward(replace(rows, source=rows), backbone.stacks(()), attention)
    return attention

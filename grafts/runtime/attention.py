"""Attention of whole sequences (training, evaluation): the rows of one forward are complete sequences, each with its
prefix."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from polygraft.grafts.runtime.route import RouteTable, current
from polygraft.grafts.runtime.stacks import Entries, Kind
from polygraft.grafts.sites import KV_SITE, ModelShape, Site
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.kv.aside import aside
from polygraft.kernels.kv.joined import joined
from polygraft.kernels.kv.layout import Layout, Sequence
from polygraft.kernels.kv.op import attend, attend_with_sums
from polygraft.kernels.kv.scores import Scores

NAME = "polygraft"


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """Attention inside (start, length) sequences, causal unless the backbone is an encoder, each one after the prefix
    rows of the graft whose span holds it."""

    sequences: tuple[tuple[int, int], ...]
    shape: ModelShape
    _layouts: dict[tuple[Entries, int], Layout] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        return attend(q, k, v, *self._prefixes(layer, k, route), scores)

    def with_sums(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        return attend_with_sums(q, k, v, *self._prefixes(layer, k, route), scores)

    def _prefixes(self, layer: int, k: Tensor, route: RouteTable) -> tuple[Tensor, Tensor, Layout]:
        """The layer's prefix stack, keys and values, and where its rows stand."""
        stack = route.stacks.get(Site(layer, KV_SITE)).get(Kind("kv"))
        if stack is None:
            empty = k.new_empty(0, k.shape[1])
            return empty, empty, self._layout((), len(k), 0, route)
        pk, pv = stack.parts["k"], stack.parts["v"]
        return pk, pv, self._layout(stack.entries, len(k), len(pk), route)

    def _layout(self, entries: Entries, rows: int, prefix_rows: int, route: RouteTable) -> Layout:
        key = (entries, rows)
        if key not in self._layouts:
            prefixes = {
                start: (segment.first, segment.size)
                for segment in route.segments(entries)
                for start, _ in self.sequences
                if segment.start <= start < segment.stop
            }
            placed = tuple(Sequence(start, length, *prefixes.get(start, (0, 0))) for start, length in self.sequences)
            self._layouts[key] = Layout(
                placed, rows, prefix_rows, self.shape.heads, self.shape.kv_heads, self.shape.causal
            )
        return self._layouts[key]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function in transformers' attention registry: flattens [1, heads, T, head_dim] and asks the current route."""
    route = current()
    q, k, v = (x.squeeze(0).transpose(0, 1).flatten(1) for x in (query, key, value))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scores, kv_heads = Scores(scaling, sliding_window), key.shape[1]
    stacks = route.stacks.get(Site(layer, KV_SITE))
    if any(kind.gate for kind in stacks):
        out = _gated(layer, q, k, v, route, kv_heads, scores)
    else:
        out = route.attention(layer, q, k, v, route=route, scores=scores)
    stack = stacks.get(Kind("kv", "aside"))
    if stack is not None:
        pk, pv = stack.parts["k"], stack.parts["v"]
        out = aside(q, out, pk, pv, route.segments(stack.entries), kv_heads, scaling)
    return out.view(1, len(out), query.shape[1], -1), None


def _gated(layer: int, q: Tensor, k: Tensor, v: Tensor, route: RouteTable, kv_heads: int, scores: Scores) -> Tensor:
    """Attention that gated prefix rows join."""
    site = Site(layer, KV_SITE)
    out, sums = route.attention.with_sums(layer, q, k, v, route=route, scores=scores)
    x = route.entered(site)
    for kind, stack in route.stacks.get(site).items():
        if kind.gate:
            segments, gates = route.segments(stack.entries), route.segments(stack.gates)
            pk, pv, G = (stack.parts[part] for part in "kvG")
            out = joined(q, out, sums, x, pk, pv, G, segments, gates, Gate(kind.gate), kv_heads, scores.scaling)
    return out


def register() -> str:
    """Put our function into transformers' registry; without a mask function of that name no mask is built."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    return NAME

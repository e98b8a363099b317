"""Attention of whole sequences (training, evaluation): the rows of one forward are complete sequences, each with its
prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from polygraft.grafts.runtime.keys import KVKey
from polygraft.grafts.runtime.route import RouteTable, current
from polygraft.grafts.runtime.stack import Stack, StackSlices
from polygraft.grafts.sites import KV_SITE, ModelShape, Site
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.kv.aside import aside
from polygraft.kernels.kv.joined import joined
from polygraft.kernels.kv.layout import Layout, Sequence, bucket
from polygraft.kernels.kv.op import attend, attend_with_sums
from polygraft.kernels.kv.scores import Scores

NAME = "polygraft"


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """Attention inside (start, length) sequences, causal unless the layer is an encoder's, each one after the prefix
    rows of the graft whose span holds it. `source` has for each the sequence of an encoder's rows that it reads."""

    sequences: tuple[tuple[int, int], ...]
    shape: ModelShape
    source: tuple[tuple[int, int], ...] = ()
    _layouts: dict[tuple[StackSlices | None, int, bool], Layout] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        return attend(q, k, v, *self._prefixes(layer, k, route), scores)

    def with_sums(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        return attend_with_sums(q, k, v, *self._prefixes(layer, k, route), scores)

    def _prefixes(self, layer: int, k: Tensor, route: RouteTable) -> tuple[Tensor, Tensor, Layout]:
        """The layer's prefix stack, keys and values, and where its rows stand."""
        stack = route.stacks.get(Site(layer, KV_SITE)).get(KVKey())
        if stack is None:
            empty = k.new_empty(0, k.shape[1])
            return empty, empty, self._layout(layer, StackSlices(), len(k), 0, route)
        pk, pv = stack.parts["k"], stack.parts["v"]
        return pk, pv, self._layout(layer, stack.slices, len(k), len(pk), route)

    def cross(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Attention to the encoder's rows, whose keys and values k and v are."""
        key, empty = (None, len(q), False), k.new_empty(0, k.shape[1])
        if key not in self._layouts:
            placed = tuple(Sequence(*own, source=read) for own, read in zip(self.sequences, self.source, strict=True))
            heads = self.shape.heads, self.shape.kv_heads
            self._layouts[key] = Layout(placed, len(q), 0, *heads, causal=False, key_rows=len(k))
        return attend(q, k, v, empty, empty, self._layouts[key], scores)

    def of_source(self) -> WholeSequences:
        """The attention of the encoder's own rows."""
        return replace(self, sequences=self.source, source=(), _layouts={})

    def longest(self, route: RouteTable) -> int:
        """Padded length that no sequence with its prefix goes beyond."""
        prefix = max((resident.spec.prefix_length for resident in route.stacks.residents), default=0)
        return bucket(prefix + max(length for _, length in self.sequences))

    def _layout(self, layer: int, slices: StackSlices, rows: int, prefix_rows: int, route: RouteTable) -> Layout:
        causal = self.shape.stack(layer).causal
        key = (slices, rows, causal)
        if key not in self._layouts:
            prefixes = {
                start: (segment.first, segment.size)
                for segment in route.segments(slices)
                for start, _ in self.sequences
                if segment.start <= start < segment.stop
            }
            placed = tuple(Sequence(start, length, *prefixes.get(start, (0, 0))) for start, length in self.sequences)
            self._layouts[key] = Layout(placed, rows, prefix_rows, self.shape.heads, self.shape.kv_heads, causal)
        return self._layouts[key]


def attention_forward(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function in transformers' attention registry: flattens [1, heads, T, head_dim] and asks the current route."""
    q, k, v = (x.squeeze(0).transpose(0, 1).flatten(1) for x in (query, key, value))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    kv_heads = key.shape[1]
    if getattr(module, "crosses", False):
        route = current()
        assert isinstance(route.attention, WholeSequences)
        return route.attention.cross(q, k, v, Scores(scaling)).view(1, len(q), query.shape[1], -1), None
    scores = Scores(scaling, sliding_window, None if position_bias is None else position_bias[0], softcap)
    return attended(layer, q, k, v, kv_heads, scores).view(1, len(q), query.shape[1], -1), None


def attended(layer: int, q: Tensor, k: Tensor, v: Tensor, kv_heads: int, scores: Scores) -> Tensor:
    """Attention of the current route's rows, with all that its grafts do in it: q [T, heads * head_dim], k and v [T,
    kv_heads * head_dim] in a layer."""
    route = current()
    site = Site(layer, KV_SITE)
    gated = [(key, stack) for key, stack in route.stacks.of_kind(site, KVKey) if key.gate != "none"]
    if gated:
        out = _joined(layer, q, k, v, gated, route, scores)
    else:
        out = route.attention(layer, q, k, v, route=route, scores=scores)
    stack = route.stacks.get(site).get(KVKey(aside=True))
    if stack is not None:
        pk, pv = stack.parts["k"], stack.parts["v"]
        out = aside(q, out, pk, pv, route.segments(stack.slices), kv_heads, scores)
    return out


def _joined(  # noqa: PLR0913
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gated: Iterable[tuple[KVKey, Stack]],
    route: RouteTable,
    scores: Scores,
) -> Tensor:
    """Attention that gated prefix rows join."""
    out, sums = route.attention.with_sums(layer, q, k, v, route=route, scores=scores)
    x, kv_heads = route.context.inputs.pop(Site(layer, KV_SITE)), k.shape[1] // (q.shape[1] // sums.shape[1])
    for key, stack in gated:
        segments, gates = route.segments(stack.slices), route.segments(stack.gates)
        pk, pv, G = (stack.parts[part] for part in "kvG")
        out = joined(q, out, sums, x, pk, pv, G, segments, gates, Gate(key.gate), kv_heads, scores)
    return out


def position_bias(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A class's bias of relative positions, over the positions of one sequence and not of all rows: what it is between
    two positions is a function of their difference, so the longest sequence's serves every one."""

    def bias(query_length: int, key_length: int, device: object = None, past_seen_tokens: int = 0) -> Tensor:
        route = current()
        assert isinstance(route.attention, WholeSequences)
        length = route.attention.longest(route)
        return compute(length, length, device=device)

    return bias


def register() -> str:
    """Put our function into transformers' registry; without a mask function of that name no mask is built."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    return NAME

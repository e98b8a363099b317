"""What the site modules of one forward need to know: which rows belong to which graft, and how rows attend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.sites import SOURCE, Site
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.scores import Scores

if TYPE_CHECKING:
    from polygraft.grafts.runtime.stacks import Entries, Entry, Stacks


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) pass through resident `graft` of the stacks, with a weight; spans may overlap."""

    start: int
    stop: int
    graft: int
    weight: float = 1.0


class Input(NamedTuple):
    """Rows [start, stop) are tokens of one prompt, which has so many `before` and `after` them in other forwards."""

    start: int
    stop: int
    before: int = 0
    after: int = 0

    def ends(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Which of these rows are of the prompt's `first` or its `last` tokens, each once; all for (0, 0)."""
        begin, end = self.start - self.before, self.stop + self.after  # of the whole prompt, in rows
        edge = min(begin + first, end)
        for low, high in ((begin, edge), (max(edge, end - last), end)) if first or last else ((begin, end),):
            if max(low, self.start) < min(high, self.stop):
                yield max(low, self.start), min(high, self.stop)


@dataclass(frozen=True, slots=True)
class Rows:
    """The token rows of one forward, flat across requests and jobs; a row under no span passes the bare backbone.

    ids and positions [T] int64; `dropout_keys` [T] int32 in training, the hash of (job, step, sample, token) of every
    row. `given` [T, hidden] stands for the embeddings of the ids where rows are no tokens but patches of images; where
    `first` is not None, for what that layer reads, and the layers below it are passed by. An encoder reads the rows of
    `source` first, where there is one. `inputs` are the rows of prompts, for grafts that make virtual tokens of them,
    right before them and in the same forward, or edit some of them alone.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    dropout_keys: Tensor | None = None
    given: Tensor | None = None
    source: Rows | None = None
    inputs: tuple[Input, ...] = ()
    first: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Rows:
        """The same on a device: all of a forward that depends on its rows moves here, at once."""
        ids, positions = self.ids.to(device), self.positions.to(device)
        keys, given = (None if x is None else x.to(device) for x in (self.dropout_keys, self.given))
        source = None if self.source is None else self.source.to(device)
        return replace(self, ids=ids, positions=positions, dropout_keys=keys, given=given, source=source)

    def padded(self, count: int) -> Rows:
        """The same with rows at the end that belong to nothing."""
        extra = count - len(self)
        ids, positions = (F.pad(x, (0, extra)) for x in (self.ids, self.positions))
        given = None if self.given is None else F.pad(self.given, (0, 0, 0, extra))
        return replace(self, ids=ids, positions=positions, given=given)


class Attention(Protocol):
    """How the rows of one forward attend; q [T, heads * head_dim], k and v [T, kv_heads * head_dim], rotary applied."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        """[T, heads * head_dim]; rows that attend to nothing are 0."""
        ...

    def with_sums(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """The same and the log sum exp of the scores [T, heads], for keys that join the softmax later."""
        ...


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routing of one forward; `segments` are derived once for all sites whose grafts have the same sizes. In the
    forward of a decoder `source` is that of the encoder's rows. `enters` are rows, and the layer that they are the
    input of; they are one graft's, and nothing acts on them."""

    spans: tuple[Span, ...]
    stacks: Stacks
    attention: Attention
    dropout_keys: Tensor | None = None
    source: RouteTable | None = None
    inputs: tuple[Input, ...] = ()
    enters: tuple[int, Tensor] | None = None
    _segments: dict[Entries, Segments] = field(default_factory=dict)
    _fused: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    _recipe: dict[str, tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=dict)
    _entered: dict[Site, Tensor] = field(default_factory=dict)

    def at(self, site: Site) -> RouteTable:
        """The routing of the rows that the site reads."""
        return self.source if self.source is not None and site.name in SOURCE else self

    def segments(self, entries: Entries) -> Segments:
        """The work list of a stack: a span's rows against its graft's place in the stack, in span order."""
        if entries not in self._segments:
            self._segments[entries] = work_list(
                self.spans, entries, dropping=self.dropout_keys is not None, inputs=self.inputs
            )
        return self._segments[entries]

    def remember(self, y: Tensor, make: Callable[[], Tensor]) -> None:
        """How to make the latest norm's output again."""
        self._recipe["norm"] = (y, make)

    def recipe(self, y: Tensor) -> Callable[[], Tensor] | None:
        """What was remembered of `y`, if it was the latest."""
        found = self._recipe.pop("norm", None)
        return found[1] if found is not None and found[0] is y else None

    def enter(self, site: Site, x: Tensor) -> None:
        """An input at a site, for what ends the site."""
        self._entered[site] = x

    def entered(self, site: Site) -> Tensor:
        """The input that entered at the site; it is forgotten."""
        return self._entered.pop(site)

    def keep(self, group: int, x: Tensor, products: list[Tensor]) -> None:
        """Remember the fused products of `x` until the group's other members ask for them."""
        self._fused[group] = (x, products)

    def kept(self, group: int, x: Tensor, member: int) -> Tensor | None:
        """The product of `member`, None when the group has not been computed for just this input; the last one
        forgets."""
        found = self._fused.get(group)
        if found is None or found[0] is not x:
            return None
        if member == len(found[1]) - 1:
            del self._fused[group]
        return found[1][member]


def work_list(
    spans: Iterable[Span], entries: Entries, *, dropping: bool = False, inputs: Iterable[Input] = ()
) -> Segments:
    """Every span's rows, or those of its `inputs` that an entry is for, against its graft's entries, in span order;
    `dropping` keeps the entries' dropout."""
    return Segments(
        tuple(
            Segment(start, stop, e.first, e.last, e.scale * s.weight, e.dropout if dropping else 0.0)
            for s in spans
            for e in entries
            if e.graft == s.graft
            for start, stop in _passing(s, e, inputs)
        )
    )


def _passing(span: Span, entry: Entry, inputs: Iterable[Input]) -> Iterator[tuple[int, int]]:
    if entry.ends == (0, 0):
        yield span.start, span.stop
    else:
        for one in inputs:
            if span.start <= one.start < span.stop:
                yield from one.ends(*entry.ends)


_ROUTE: ContextVar[RouteTable] = ContextVar("route")


def current() -> RouteTable:
    """The table of the forward that is running; LookupError outside one."""
    return _ROUTE.get()


@contextmanager
def routed(table: RouteTable) -> Iterator[None]:
    """Make `table` the current one (also inside a recomputation during backward)."""
    token = _ROUTE.set(table)
    try:
        yield
    finally:
        _ROUTE.reset(token)

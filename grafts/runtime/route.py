"""What the site modules of one forward need to know: which rows belong to which graft, and how rows attend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.context import ForwardContext
from polygraft.grafts.runtime.stack import StackSlice, StackSlices
from polygraft.grafts.sites import SOURCE, Site
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.scores import Scores

if TYPE_CHECKING:
    from polygraft.grafts.runtime.stacks import Stacks

_KEPT = 4  # sets of work lists of a composition of grafts: streams come and go, and the same rows come again


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
    row. `inputs_embeds` [T, hidden] stands for the embeddings of the ids where rows are no tokens but patches of
    images; where `entry_layer` is not None, for what that layer reads, and the layers below it are passed by. An
    encoder reads the rows of `source` first, where there is one. `inputs` are the rows of prompts, for grafts that make
    virtual tokens of them, right before them and in the same forward, or edit some of them alone.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    dropout_keys: Tensor | None = None
    inputs_embeds: Tensor | None = None
    source: Rows | None = None
    inputs: tuple[Input, ...] = ()
    entry_layer: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Rows:
        """The same on a device: all of a forward that depends on its rows moves here, at once."""
        ids, positions = self.ids.to(device), self.positions.to(device)
        keys, embeds = (None if x is None else x.to(device) for x in (self.dropout_keys, self.inputs_embeds))
        source = None if self.source is None else self.source.to(device)
        return replace(self, ids=ids, positions=positions, dropout_keys=keys, inputs_embeds=embeds, source=source)

    def padded(self, count: int) -> Rows:
        """The same with rows at the end that belong to nothing."""
        extra = count - len(self)
        ids, positions = (F.pad(x, (0, extra)) for x in (self.ids, self.positions))
        embeds = None if self.inputs_embeds is None else F.pad(self.inputs_embeds, (0, 0, 0, extra))
        return replace(self, ids=ids, positions=positions, inputs_embeds=embeds)


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


class Entry(NamedTuple):
    """Rows [P, hidden] that are the input of a layer; they are one graft's, and nothing acts on them."""

    layer: int
    rows: Tensor


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routing of one forward; `segments` are derived once for all sites whose grafts have the same sizes. In the
    forward of a decoder `source` is that of the encoder's rows. Where `entry` is not None, its rows pass the layers
    below it by. Below layer `lowest` no gradient is asked for. `context` is what modules leave for each other,
    `work_lists` what `segments` has made."""

    spans: tuple[Span, ...]
    stacks: Stacks
    attention: Attention
    dropout_keys: Tensor | None = None
    source: RouteTable | None = None
    inputs: tuple[Input, ...] = ()
    entry: Entry | None = None
    lowest: int = 0
    context: ForwardContext = field(default_factory=ForwardContext)
    work_lists: dict[StackSlices, Segments] = field(default_factory=dict)

    def at(self, site: Site) -> RouteTable:
        """The routing of the rows that the site reads."""
        return self.source if self.source is not None and site.name in SOURCE else self

    def lowest_layer(self) -> int | None:
        """The first layer at which a row passes a graft; None where none does anywhere."""
        sites = self.stacks.derived((RouteTable,), lambda: sorted(self.stacks.at))
        return next((site.layer for site in sites if self._passed(site)), None)

    def _passed(self, site: Site) -> bool:
        return any(self.segments(stack.slices).items for stack in self.stacks.get(site).values())

    def segments(self, slices: StackSlices) -> Segments:
        """The work list of a stack: a span's rows against its graft's place in the stack, in span order."""
        if slices not in self.work_lists:
            self.work_lists[slices] = work_list(
                self.spans, slices, dropping=self.dropout_keys is not None, inputs=self.inputs
            )
        return self.work_lists[slices]


def kept_work_lists(rows: Rows, stacks: Stacks) -> dict[StackSlices, Segments]:
    """Those of an earlier forward over the same spans, with what was derived from them: rows that decode come again at
    every step, and nothing about their grafts is then made or sent to a device again.

    Where grafts are trained, every forward has its own, since a slice may be absent at one step and not at another. A
    tensor that was made in inference mode is no use outside.
    """
    if stacks.trainable:
        return {}
    kept = stacks.derived((kept_work_lists,), OrderedDict[Hashable, dict[StackSlices, Segments]])
    key = rows.spans, rows.inputs, rows.dropout_keys is None, torch.is_inference_mode_enabled()
    lists = kept.setdefault(key, {})
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
    return lists


def work_list(
    spans: Iterable[Span], slices: StackSlices, *, dropping: bool = False, inputs: Iterable[Input] = ()
) -> Segments:
    """Every span's rows, or those of its `inputs` that a slice is for, against its graft's slices that are not absent,
    in span order; `dropping` keeps the slices' dropout."""
    return Segments(
        tuple(
            Segment(start, stop, own.first, own.last, own.scale * s.weight, own.dropout if dropping else 0.0)
            for s in spans
            for own in slices
            if own.graft == s.graft and not (own.absent is not None and own.absent())
            for start, stop in _passing(s, own, inputs)
        )
    )


def _passing(span: Span, own: StackSlice, inputs: Iterable[Input]) -> Iterator[tuple[int, int]]:
    if own.ends == (0, 0):
        yield span.start, span.stop
    else:
        for one in inputs:
            if span.start <= one.start < span.stop:
                yield from one.ends(*own.ends)


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

"""Attention on a CPU of rows that continue cached sequences, straight over the blocks of a page table: nothing is
gathered.

Scores, softmax and sums are in float32, whatever the dtype. A query's numbers are sums over its own sequence's
positions in whole tiles of sixteen, from the tile of the first position that it sees on, and one thread computes all of
them: so neither the rows beside it, nor how a prompt is cut, nor the number of threads has a part in its bits.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polygraft.kernels.compiled.calls import DTYPES, Call, Function, computes, function, structure
from polygraft.kernels.kv.layout import Continued
from polygraft.kernels.kv.scores import Scores

_SOURCE = Path(__file__).with_name("paged.cpp")
_PAGES = structure("Pages", pointers="sequences tables unseen", integers="count table_stride unseen_stride")
_PAGED = structure(
    "Paged",
    pointers="q out sums cache pages",
    integers="layer q_stride out_stride rows heads kv_heads head_dim block dtype window",
    numbers="scaling cap",
    integers_="threads",
)


class Pages:
    """The sequences of a forward where paged.cpp reads them, in one place however often they change."""

    def __init__(self) -> None:
        self._structure = _PAGES()
        self._arrays: tuple[array[int], ...] = ()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._structure)

    def hold(self, sequences: Sequence[Continued], unseen: Sequence[Sequence[int]]) -> None:
        """From now on these; `unseen` has in each layer how many leading positions of each sequence are not seen, or
        one entry for all layers."""
        width = max((len(s.blocks) for s in sequences), default=0)
        placed = array("q", [number for s in sequences for number in (s.start, s.rows, s.before)])
        tables = array("q", [block for s in sequences for block in (*s.blocks, *[0] * (width - len(s.blocks)))])
        hidden = array("q", [count for by_sequence in unseen for count in by_sequence])
        self._arrays = placed, tables, hidden
        held = self._structure
        held.sequences, held.tables, held.unseen = (numbers.buffer_info()[0] for numbers in self._arrays)
        held.count, held.table_stride = len(sequences), width
        held.unseen_stride = len(sequences) if len(unseen) > 1 else 0


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """The layer that attends, by its number among those that `Pages` know, and how."""

    layer: int
    heads: int
    kv_heads: int
    scores: Scores


def supports(q_TE: Tensor, cache: Tensor, scores: Scores) -> bool:
    """Whether `attend_paged` is for these, here."""
    return _compiled(q_TE, cache, scores) is not None


def attend_paged(q_TE: Tensor, cache: Tensor, pages: Pages, layer: PagedLayer, sums_TH: Tensor | None = None) -> Tensor:
    """Semantics: out[row] = softmax(bent(scaling * q[row] keys^T)) values, head by head, over those of its sequence's
    positions up to its own that its layer sees and that are in the window; rows of no sequence are 0. The log of each
    softmax's sum goes to `sums` [T, heads] float32, -inf in rows of no sequence.

    q [T, heads * head_dim], whose rows may be a stride apart; cache [blocks, block, 2, kv_heads * head_dim] of its
    dtype. Only where `supports` says so. Not differentiable.
    """
    out = q_TE.new_empty(q_TE.shape)
    call = ready(q_TE, out, cache, pages, layer, sums_TH)
    assert call is not None
    call()
    return out


def ready(
    q_TE: Tensor, out_TE: Tensor, cache: Tensor, pages: Pages, layer: PagedLayer, sums_TH: Tensor | None = None
) -> Call | None:
    """The call of `attend_paged` that writes to `out`, for what `pages` hold by then; None where it is not compiled."""
    scores = layer.scores
    compiled = _compiled(q_TE, cache, scores)
    if compiled is None:
        return None
    assert cache.is_contiguous()
    assert out_TE.stride(1) == 1
    return compiled.ready(
        pages,
        q=q_TE,
        out=out_TE,
        sums=sums_TH,
        cache=cache,
        pages=pages.address,
        layer=layer.layer,
        q_stride=q_TE.stride(0),
        out_stride=out_TE.stride(0),
        rows=len(q_TE),
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=q_TE.shape[1] // layer.heads,
        block=cache.shape[1],
        dtype=DTYPES[q_TE.dtype],
        window=scores.window or 0,
        scaling=scores.scaling,
        cap=scores.cap or 0.0,
        threads=torch.get_num_threads(),
    )


def _compiled(q: Tensor, cache: Tensor, scores: Scores) -> Function | None:
    fits = q.dtype == cache.dtype and q.stride(1) == 1 and scores.bias is None and computes(q, cache)
    return function(_SOURCE, "paged", _PAGED, _PAGES) if fits else None

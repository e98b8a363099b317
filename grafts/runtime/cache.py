"""The KV cache in blocks, and the attention of rows that continue cached sequences (prefill chunks and decode rows
mixed)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import KV, Layers, SpecError
from polygraft.kernels.kv.layout import Continued, outside
from polygraft.kernels.kv.paged import PagedLayer, Pages, attend_paged, supports
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.kv.tiles import PagedTiles

BUCKET_BLOCKS = (
    4  # contexts are gathered in multiples of this many blocks: few matmul shapes, a function of the own length
)


class KVCache:
    """Keys and values of all layers, [layers, blocks, block_size, 2, kv_width]; block 0 is never given out and stays
    zero. A block is cleared when it is given out: until then it takes no memory on a CPU, which maps pages when they
    are written."""

    def __init__(
        self,
        shape: ModelShape,
        blocks: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if not shape.causal:
            raise SpecError(f"backbone: {shape.sees}; it cannot decode")
        self.shape, self.blocks, self.block_size = shape, blocks, block_size
        self.data = torch.empty(shape.layers, blocks, block_size, 2, shape.kv_width, dtype=dtype, device=device)
        self.clear([0])

    @staticmethod
    def bytes_per_block(shape: ModelShape, block_size: int, dtype: torch.dtype) -> int:
        return shape.layers * block_size * 2 * shape.kv_width * dtype.itemsize

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero blocks before another sequence gets them: what one left behind, even a NaN, cannot reach the next."""
        index = torch.tensor(list(blocks), dtype=torch.long)
        if len(index):
            self.data[:, index.to(self.data.device)] = 0

    def copy(self, source: int, block: int, slots: int) -> None:
        """Put the first `slots` slots of one block into another."""
        self.data[:, block, :slots] = self.data[:, source, :slots]

    def write_prefix(self, table: Sequence[int], resident: Resident, first: int = 0) -> None:
        """Put a prefix graft's rows at positions `first` to p - 1 of a sequence, in every layer they act in."""
        for tensor in resident.graft.tensors:
            slot = resident.graft.spec.slots[tensor.slot]
            if isinstance(slot, KV) and not slot.aside and tensor.site is not None:
                slots = _slots(table, first, max(0, tensor.shape[0] - first), self.block_size).to(self.data.device)
                rows = self.data[tensor.site.layer].flatten(0, 1)[:, 0 if tensor.part == "k" else 1]
                rows[slots] = resident.tensors[tensor.name][first:].to(rows.dtype)


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """Batch rows [start, start + rows) continue a sequence that has `before` positions cached (its prefix included).

    `table` names its blocks in order and must reach beyond before + rows positions. The first `prefix` positions are a
    graft's and are seen in `prefix_layers` only (None: in all).
    """

    start: int
    rows: int
    before: int
    table: tuple[int, ...]
    prefix: int = 0
    prefix_layers: Layers = None

    def unseen(self, layer: int) -> int:
        """Leading positions that `layer` does not see."""
        return 0 if self.prefix_layers is None or layer in self.prefix_layers else self.prefix


@dataclass(frozen=True)
class _Group:
    """Sequences of one row count n and one context bucket of L positions: their batch rows [b * n], blocks [b, L /
    block], the positions [b, L] in them, hidden keys [b, n, L]."""

    rows: Tensor
    blocks: Tensor
    positions: Tensor
    hidden: Tensor
    sequences: tuple[PagedSequence, ...]
    _biases: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def bias(self, layer: int, heads: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of `heads` heads in a layer, [b, 1, heads * n, L]: -inf for what a window leaves
        out and for a prefix that the layer does not have."""
        unseen = tuple(sequence.unseen(layer) for sequence in self.sequences)
        if unseen not in self._biases:
            hidden = self.hidden | (self.positions < torch.tensor(unseen).unsqueeze(1)).unsqueeze(1)
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._biases[unseen] = bias.repeat(1, heads, 1).unsqueeze(1)
        return self._biases[unseen]


class PagedAttention:
    """Writes the keys and values of a forward's rows into the cache, then attends to every row's own context."""

    def __init__(self, cache: KVCache, sequences: Sequence[PagedSequence]) -> None:
        self.cache, self._sequences = cache, tuple(sequences)
        self._by_window: dict[int | None, list[_Group]] = {}
        self._tiles: PagedTiles | None = None
        self._places: tuple[Tensor, Tensor] | None = None
        if cache.data.is_cuda:  # before the first layer, so that a CUDA graph of the layers is sent nothing
            group = cache.shape.heads // cache.shape.kv_heads
            self._tiles = PagedTiles.of(*self._continued(), group).to(cache.data.device)
            self._places = self._placed()

    def slots(self, rows: int) -> list[int]:
        """The cache row of each of a forward's `rows`, -1 for those of no sequence."""
        slots = [-1] * rows
        for s in self._sequences:
            slots[s.start : s.start + s.rows] = self._written(s)
        return slots

    def _written(self, s: PagedSequence) -> list[int]:
        """The cache rows that a sequence's new keys and values go to."""
        size = self.cache.block_size
        return [s.table[p // size] * size + p % size for p in range(s.before, s.before + s.rows)]

    def hold(self, pages: Pages) -> None:
        """Put the sequences where compiled attention reads them."""
        pages.hold(*self._continued())

    def _continued(self) -> tuple[list[Continued], list[list[int]]]:
        """The sequences, and in each layer, or for all, how many leading positions of each are not seen."""
        layers = range(self.cache.shape.layers) if any(s.prefix_layers is not None for s in self._sequences) else (0,)
        continued = [Continued(s.start, s.rows, s.before, s.table) for s in self._sequences]
        return continued, [[s.unseen(layer) for s in self._sequences] for layer in layers]

    @cached_property
    def _pages(self) -> Pages:
        pages = Pages()
        self.hold(pages)
        return pages

    def _placed(self) -> tuple[Tensor, Tensor]:
        """The rows of all sequences and the cache rows that they are written to."""
        rows = [row for s in self._sequences for row in range(s.start, s.start + s.rows)]
        slots = [slot for s in self._sequences for slot in self._written(s)]
        placed = torch.tensor([rows, slots], dtype=torch.long).to(self.cache.data.device)
        return placed[0], placed[1]

    def _groups(self, window: int | None) -> list[_Group]:
        """The sequences by row count and context bucket, from the first whole bucket that the window reaches into."""
        if window not in self._by_window:
            members: Mapping[tuple[int, int], list[tuple[int, PagedSequence]]] = defaultdict(list)
            span = self.cache.block_size * BUCKET_BLOCKS
            for s in self._sequences:
                first = 0 if window is None else max(0, s.before - window + 1) // span * BUCKET_BLOCKS
                stop = -(-(s.before + s.rows) // span) * BUCKET_BLOCKS
                members[s.rows, stop - first].append((first, s))
            self._by_window[window] = [self._group(*key, placed, window) for key, placed in sorted(members.items())]
        return self._by_window[window]

    def _group(self, count: int, width: int, placed: Sequence[tuple[int, PagedSequence]], window: int | None) -> _Group:
        tables = [[*s.table[first : first + width], *[0] * (first + width - len(s.table))] for first, s in placed]
        rows = torch.cat([torch.arange(s.start, s.start + count) for _, s in placed])
        own = torch.stack([torch.arange(s.before, s.before + count) for _, s in placed])
        starts = torch.tensor([first * self.cache.block_size for first, _ in placed])
        positions = starts.unsqueeze(1) + torch.arange(width * self.cache.block_size)
        hidden = outside(own.unsqueeze(2), positions.unsqueeze(1), window)
        return _Group(rows, torch.tensor(tables), positions, hidden, tuple(s for _, s in placed))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        """As `Attention`; rows of no sequence are 0."""
        return self._over(layer, q, k, v, scores, None)

    def with_sums(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        sums = q.new_full((len(q), self.cache.shape.heads), float("-inf"), dtype=wide)
        return self._over(layer, q, k, v, scores, sums), sums

    def _over(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores, sums: Tensor | None) -> Tensor:
        """Writes the log sums of scores into `sums`, where they are asked for."""
        if self._places is None:
            self._places = self._placed()
        data, (rows, slots) = self.cache.data[layer], self._places
        new = torch.stack([x.index_select(0, rows) for x in (k, v)], dim=1)
        data.flatten(0, 1).index_copy_(0, slots, new)
        asked = PagedLayer(layer, self.cache.shape.heads, self.cache.shape.kv_heads, scores)
        if self._tiles is not None:
            from polygraft.kernels.kv import gpu  # Triton is loaded only where there is a GPU

            return gpu.attend_paged(q, data, self._tiles, asked, sums)
        if supports(q, data, scores):
            return attend_paged(q, data, self._pages, asked, sums)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for group in self._groups(scores.window):
            own = q.index_select(0, group.rows)
            out.index_copy_(0, group.rows, self._attend(layer, own, data, group, scores, sums))
        return out

    def _attend(
        self, layer: int, q: Tensor, data: Tensor, group: _Group, scores: Scores, sums: Tensor | None
    ) -> Tensor:
        """Attention of a group's rows [b * n, width]; the query heads of a key head are more rows to it."""
        kv_heads, shared = self.cache.shape.kv_heads, self.cache.shape.heads // self.cache.shape.kv_heads
        b, n, length = group.hidden.shape
        context = data.flatten(1).index_select(0, group.blocks.flatten()).view(b, length, 2, kv_heads, -1)
        keys, values = context[:, :, 0].transpose(1, 2), context[:, :, 1].transpose(1, 2)
        queries = q.view(b, n, kv_heads, shared, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        bias = group.bias(layer, shared, q.dtype)
        if sums is not None or scores.cap is not None:  # again: the library keeps them for itself, and has no caps
            products = torch.matmul(queries * scores.scaling, keys.transpose(2, 3))
            products = products.to(torch.promote_types(q.dtype, torch.float32))
            scored = (products if scores.cap is None else scores.cap * torch.tanh(products / scores.cap)) + bias
        if sums is not None:
            sums.index_copy_(0, group.rows, _by_row(scored.logsumexp(-1, keepdim=True), shared, n))
        if scores.cap is not None:
            return _by_row(torch.matmul(scored.softmax(-1).to(q.dtype), values), shared, n)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scores.scaling)
        return _by_row(mixed, shared, n)


def _by_row(x: Tensor, shared: int, n: int) -> Tensor:
    """[b * n, heads * width] of [b, kv_heads, shared * n, width]."""
    return torch.unflatten(x, 2, (shared, n)).permute(0, 3, 1, 2, 4).reshape(len(x) * n, -1)


def _slots(table: Sequence[int], first: int, count: int, block_size: int) -> Tensor:
    """Flat cache rows of positions [first, first + count)."""
    positions = torch.arange(first, first + count)
    return torch.tensor(table, dtype=torch.long)[positions // block_size] * block_size + positions % block_size

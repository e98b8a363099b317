"""What a step of a job takes of memory beside its state, and what decoding with its graft moves: estimates from shapes
alone, before anything is computed. Torch-free.

A step's memory is never less than what was measured of any method (`tests/grafts/test_cost.py`), and at most a few
times as much.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.spec import KV, Affine, Branch, Delta, Norm, Rotate, Slot, Sparse, Tokens
from polygraft.kernels.affine import cost as affine
from polygraft.kernels.branch import cost as branch
from polygraft.kernels.delta import cost as delta
from polygraft.kernels.kv.cost import score_bytes
from polygraft.kernels.rotate import cost as rotate
from polygraft.kernels.sparse import cost as sparse

_HEAD_ROWS = 128  # whose logits exist at a time (`trainers/loss.py`)
_SLACK = 1.25  # over what is counted


@dataclass(frozen=True)
class StepCost:
    """Of a graft in training on a backbone whose numbers have `itemsize` bytes, and whose attention has the scores of
    `block` queries at a time, or of all of them."""

    graft: BoundGraft
    itemsize: int
    block: int | None = None

    @property
    def _slots(self) -> tuple[Slot, ...]:
        return self.graft.spec.slots

    @property
    def _wide(self) -> int:
        return max(4, self.itemsize)

    @cached_property
    def row_bytes(self) -> int:
        """Of a row between its forward and its backward: in every layer what the backbone keeps, and at every site of
        the graft what its op may keep of what it reads and writes."""
        shape = self.graft.shape
        E, C, D, F = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.ffn
        layer = self.itemsize * (3 * D + 2 * E + 4 * C + 2 * F)
        own = 0
        for index, site in self.graft.sites:
            slot, (d_in, d_out) = self._slots[index], shape.dims(site.name)
            if isinstance(slot, Branch) and slot.tap == "input" and slot.act == "identity" and slot.gate == "none":
                own += self.itemsize * (d_in + 2 * slot.rank)  # computed with the product: its result is nobody's
            else:
                own += self._wide * (d_in + 2 * d_out + 2 * (slot.rank if isinstance(slot, Branch) else 0))
        return int(_SLACK * (shape.layers * layer + own))

    @cached_property
    def _graft_bytes(self) -> int:
        """Of its tensors in the stacks with their gradients, and of the largest matrix that is made for a delta."""
        deltas = [self.graft.shape.dims(site.name) for i, site in self.graft.sites if isinstance(self._slots[i], Delta)]
        made = max((d_in * d_out for d_in, d_out in deltas), default=0)
        return 2 * self._wide * (self.graft.parameters + self.graft.frozen + made)

    def bytes(self, lengths: Sequence[int]) -> int:
        """Of a forward and backward over sequences of so many tokens."""
        shape, virtual = self.graft.shape, self.graft.virtual_length
        rows = sum(lengths) + virtual * len(lengths)
        widths = 6 * shape.hidden + 4 * shape.ffn + 4 * shape.heads * shape.head_dim
        sequences = ((length + virtual, self.graft.prefix_length) for length in lengths)
        scores = score_bytes(sequences, shape.heads, itemsize=self.itemsize, block=self.block)
        logits = min(rows, _HEAD_ROWS) * shape.vocab * (self.itemsize + self._wide)
        passing = max(self._wide * rows * widths + scores, logits)  # in one layer, or at the head
        return rows * self.row_bytes + int(_SLACK * passing) + self._graft_bytes

    def longest(self, room: int, most: int) -> int:
        """Tokens of the longest sequence, at most `most`, whose forward and backward fit into `room`."""
        return bisect_right(range(1, most + 1), room, key=lambda length: self.bytes([length]))

    def rows_within(self, room: int, most: int, longest: int) -> int:
        """`most` rows, halved until samples of at most `longest` tokens that have so many rows fit into `room`."""
        rows = most
        while rows > 1 and self.bytes([min(longest, rows)] * -(-rows // max(1, min(longest, rows)))) > room:
            rows //= 2
        return rows


def decode_bytes(graft: BoundGraft, itemsize: int) -> int:
    """What a graft moves for every decoded token beside what the backbone does, alone in its batch: its operands, and
    what its ops read and write of the token's rows; of virtual tokens their keys and values in every layer.

    As it is served without merging (`BoundGraft.plain`); DoRA's norm is an affine then.
    """
    served, shape = graft.plain, graft.shape
    rows = 2 * itemsize * shape.kv_width  # a token's keys and values in a layer
    moved = shape.layers * served.virtual_length * rows
    for index, site in served.sites:
        slot, (d_in, d_out) = served.spec.slots[index], shape.dims(site.name)
        match slot:
            case Branch(rank=rank, gate=gate, experts=experts):
                moved += branch.bytes_moved([(1, rank)], d_in, d_out, itemsize=itemsize)
                moved += itemsize * experts * d_in * (gate != "none")
            case Affine(side=side):
                moved += affine.bytes_moved(1, d_in if side == "in" else d_out, 1, itemsize=itemsize)
            case Norm():
                moved += affine.bytes_moved(1, d_out, 1, itemsize=itemsize)
            case Sparse(rows=whole):
                entries = slot.count(d_in, d_out) * (d_in if whole else 1)
                moved += sparse.bytes_moved(1, entries, d_out, itemsize=itemsize)
            case Rotate(kind=kind, size=size, stages=stages, side=side):
                block = {"blocks": size, "lowrank": 2 * size, "pairs": 2}[kind]
                width = d_in if side == "in" else d_out
                moved += rotate.bytes_moved(1, width, 1, block=block, itemsize=itemsize, stages=stages)
            case Delta():
                moved += delta.bytes_moved(1, d_in, d_out, itemsize=itemsize)
            case KV(length=length):
                moved += length * rows
            case Tokens():
                pass  # counted above
    return moved

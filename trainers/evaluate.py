"""The held-out loss of a graft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident
from polygraft.trainers.job import Sample
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_losses


def mean_loss(
    backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor], samples: Iterable[Sample], max_rows: int = 768
) -> float:
    """Mean loss of a weighted token under a graft over `samples`, at most `max_rows` rows at a time."""
    stacks = backbone.stacks((Resident("evaluated", graft, values),))
    total = weight = 0.0
    for piece in _pieces(samples, max_rows, graft.virtual_length):
        numbers = tuple(range(len(piece)))
        micro_batch = MicroBatch(0, graft.prefix_length, piece, numbers, 1.0, virtual_length=graft.virtual_length)
        total += forward_losses(backbone, stacks, [micro_batch])[0]
        weight += sum(sample.weight for sample in piece)
    return total / weight


def _pieces(samples: Iterable[Sample], limit: int, virtual: int) -> Iterator[tuple[Sample, ...]]:
    piece: list[Sample] = []
    for sample in samples:
        if piece and sum(s.rows + virtual for s in piece) + sample.rows + virtual > limit:
            yield tuple(piece)
            piece = []
        piece.append(sample)
    if piece:
        yield tuple(piece)

"""What examples say of a graft: its loss, and how well it answers them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from polygraft.cluster.scores import Scores
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.shared_rows import rows_of
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.head import ClassHead
from polygraft.trainers.job import Sample
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_answers, forward_logits
from polygraft.trainers.scores import Answer, Chosen, label_scores, scores_of

_PIECES = 4  # of a forward at most: attention has their rows apart


@dataclass(frozen=True, slots=True)
class Judgement:
    """The mean loss of a weighted token of the right answers, and the scores."""

    loss: float
    scores: Scores

    @property
    def finite(self) -> bool:
        return isfinite(self.loss)


def judge(
    backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor], samples: Sequence[Sample], max_rows: int = 768
) -> Judgement:
    """What `samples` say of a graft, at most `max_rows` rows at a time: a function of both, whoever else is in the
    pack."""
    resident = Resident("evaluated", graft, values)
    stacks = backbone.stacks((resident,))
    total, answers = _answers(backbone, stacks, resident, samples, max_rows)
    loss = total / sum(sample.weight for sample in samples)
    if graft.head:
        return Judgement(loss, label_scores(answers))
    others = [other for sample in samples if sample.question for other in sample.question.others]
    losses = (answer.loss for answer in _answers(backbone, stacks, resident, others, max_rows)[1])
    chosen = []
    for sample, answer in zip(samples, answers, strict=True):
        if (asked := sample.question) is not None:
            every = [next(losses) for _ in asked.others]
            every.insert(asked.answer, answer.loss)
            chosen.append(Chosen(asked.texts, asked.answer, tuple(every)))
    return Judgement(loss, scores_of(answers, chosen))


def mean_loss(
    backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor], samples: Iterable[Sample], max_rows: int = 768
) -> float:
    """Mean loss of a weighted token under a graft over `samples`, at most `max_rows` rows at a time."""
    every, resident = tuple(samples), Resident("evaluated", graft, values)
    total, _ = _answers(backbone, backbone.stacks((resident,)), resident, every, max_rows)
    return total / sum(sample.weight for sample in every)


def probabilities(
    backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor], texts: Sequence[Sample], max_rows: int = 768
) -> Tensor:
    """[texts, labels] of a graft with a classifier, float32 or wider."""
    resident = Resident("evaluated", graft, values)
    stacks, found = backbone.stacks((resident,)), []
    for piece in _pieces(texts, max_rows, graft.virtual_length):
        found.append(forward_logits(backbone, stacks, _micro_batch(resident, stacks, piece)).softmax(dim=1))
    return torch.cat(found)


def _micro_batch(resident: Resident, stacks: Stacks, piece: tuple[Sample, ...]) -> MicroBatch:
    graft = resident.graft
    head = ClassHead(graft.head, stacks.residents[0].tensors) if graft.head else None
    numbers = tuple(range(len(piece)))
    return MicroBatch(0, graft.prefix_length, piece, numbers, 1.0, virtual_length=graft.virtual_length, head=head)


def _answers(
    backbone: Backbone, stacks: Stacks, resident: Resident, samples: Sequence[Sample], max_rows: int
) -> tuple[float, list[Answer]]:
    """The summed weighted loss of samples under the stacks' only resident, and what each came to."""
    total, found = 0.0, []
    for pieces in _together(_pieces(samples, max_rows, resident.graft.virtual_length), max_rows, resident.graft):
        losses, answers = forward_answers(backbone, stacks, [_micro_batch(resident, stacks, one) for one in pieces])
        for loss in losses:  # the total's bits are those of the pieces, whichever are computed together
            total += loss
        found += answers
    return total, found


def _together(
    pieces: Iterable[tuple[Sample, ...]], limit: int, graft: BoundGraft
) -> Iterator[Sequence[tuple[Sample, ...]]]:
    """Those that one forward computes: more than one where its samples share rows."""
    group: list[tuple[Sample, ...]] = []
    for piece in pieces:
        alone = graft.reads_ahead or graft.head or len(group) == _PIECES
        if group and (alone or _shared_rows([*group, piece]) + graft.virtual_length > limit):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _shared_rows(pieces: Iterable[tuple[Sample, ...]]) -> int:
    return max(rows_of(sample.ids[:-1] for piece in pieces for sample in piece), default=-1) + 1


def _pieces(samples: Iterable[Sample], limit: int, virtual: int) -> Iterator[tuple[Sample, ...]]:
    piece: list[Sample] = []
    for sample in samples:
        if piece and sum(s.rows + virtual for s in piece) + sample.rows + virtual > limit:
            yield tuple(piece)
            piece = []
        piece.append(sample)
    if piece:
        yield tuple(piece)

"""What a micro-batch gives the optimiser step of its job, and how the ranks of a pack come to have all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from polygraft.trainers.failure import Failed
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Contribution:
    """The normalised `loss`, and the `gradient` of the trained tensors, flat in the master's dtype; or for a job
    without a backward the `difference` of the losses on both sides of its tensors."""

    loss: float
    difference: float = 0.0
    gradient: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rider:
    """A job's micro-batch in a step, computed by `rank`; it is `ahead` of the job's next one by so many."""

    job: str
    ahead: int
    rank: int
    micro_batch: MicroBatch


Part = Contribution | Failed


def everyones(
    ranks: Ranks, riders: Sequence[Rider], mine: Mapping[str, Part], like: Mapping[str, Tensor]
) -> Iterator[tuple[Rider, Part]]:
    """All riders in their order with what they give, on every rank; this one computed `mine`, by job. A gradient is
    shaped as the job's tensor in `like`."""
    told = ranks.share({job: _said(part) for job, part in mine.items()})
    for rider in riders:
        said = told[rider.rank][rider.job]
        if isinstance(said, Failed):
            yield rider, said
            continue
        loss, difference, has_gradient = said
        gradient = None
        if has_gradient:
            own = mine[rider.job] if rider.rank == ranks.rank else None
            computed = own.gradient if isinstance(own, Contribution) else None
            gradient = like[rider.job].new_empty(like[rider.job].shape) if computed is None else computed
            ranks.copy(gradient, rider.rank)
        yield rider, Contribution(loss, difference, gradient)


def failed_anywhere(ranks: Ranks, failed: Iterable[Failed]) -> list[Failed]:
    """The first failure of each job, whichever rank it came to pass on: a job that one rank has lost, all have."""
    first: dict[str, Failed] = {}
    for said in ranks.share(list(failed)):
        for one in said:
            first.setdefault(one.job, one)
    return list(first.values())


def _said(part: Part) -> Failed | tuple[float, float, bool]:
    return part if isinstance(part, Failed) else (part.loss, part.difference, part.gradient is not None)

"""Ranks of a pack, a thread each: all hold the bits of one rank alone, and lose whom one of them loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import TypeVar, cast

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.ranks import Ranks
from polygraft.trainers.runner import PackRunner, PackStep
from tests.tiny import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
T = TypeVar("T")
R = TypeVar("R")
TEXTS = {
    "a": "lora(r=4, at=attn.*)",
    "b": "bitfit",
    "c": "bitfit + mezo(0.05)",
    "d": "lora(r=4, at=attn.q) + elastic(sizes=2|4)",
}


class Meeting:
    """Where two ranks meet: what each has brought."""

    def __init__(self) -> None:
        self._barrier = Barrier(2, timeout=60)
        self._brought: list[object] = [None, None]

    def exchange(self, rank: int, mine: T) -> list[T]:
        self._brought[rank] = mine
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        return cast("list[T]", found)


class Rank:
    """One of two."""

    size = 2

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self._meeting = rank, meeting

    def tell(self, order: T | None) -> T:
        return cast("T", self.share(order)[0])

    def share(self, mine: T) -> list[T]:
        return self._meeting.exchange(self.rank, mine)

    def copy(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self._meeting.exchange(self.rank, tensor.clone())[source])


@pytest.fixture(scope="module")
def backbones(folder: Path) -> Sequence[Backbone]:
    return [Backbone.load(folder, torch.float32, training=True) for _ in range(2)]


def jobs() -> list[TrainJob]:
    """Of three micro-batches a step and less, each of another text."""
    found = []
    for number, (name, text) in enumerate(TEXTS.items()):
        samples = tuple(
            Sample((*range(3 + number, 9 + number + n),), (0.0, *(1.0,) * (5 + n)))  # of 5 rows and more
            for n in range(5)
        )
        config = TrainConfig(epochs=2, batch_size=3, learning_rate=1e-2, micro_rows=8)
        found.append(TrainJob(name, BoundGraft(parse(text), TINY), config, samples))
    return found


def raises_in_step(pack: PackRunner, step: int, loses: str) -> None:
    lane = pack._gradient
    real = lane.forward

    def forward(stacks: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
        if loses in batches and lane.jobs[loses].step == step:
            raise RuntimeError("only here")
        return real(stacks, batches)

    lane.forward = forward  # type: ignore[assignment,method-assign]


Ran = tuple[Mapping[str, Tensor], list[PackStep]]


def run(backbone: Backbone, ranks: Ranks | None, loses: str = "") -> Ran:
    """The jobs' tensors and what each step said; the forward of the third step of job `loses` raises."""
    pack, said = PackRunner(backbone, max_rows=24, ranks=ranks), list[PackStep]()
    raises_in_step(pack, 2, loses)
    for job in jobs():
        pack.admit(job)
    while any(not running.finished for running in pack.jobs.values()):
        said.append(pack.step())
        for failed in said[-1].failed:
            pack.remove(failed.job)
    return {job: running.slab.master for job, running in pack.jobs.items()}, said


def on_both(act: Callable[[Rank], R]) -> list[R]:
    meeting = Meeting()
    with ThreadPoolExecutor(2) as threads:
        return [*threads.map(lambda rank: act(Rank(rank, meeting)), range(2))]


def on_two(backbones: Sequence[Backbone], loses: Sequence[str] = ("", "")) -> list[Ran]:
    return on_both(lambda rank: run(backbones[rank.rank], rank, loses[rank.rank]))


@pytest.fixture(scope="module")
def alone(backbones: Sequence[Backbone]) -> Ran:
    return run(backbones[0], None)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[job], other[job]) for job in one)


def outcomes(said: Sequence[PackStep]) -> dict[str, list[tuple[int, float, float, int]]]:
    found: dict[str, list[tuple[int, float, float, int]]] = {}
    for step in said:
        for one in step.stepped:
            found.setdefault(one.job, []).append((one.step, one.loss, one.norm, one.tokens))
    return found


def test_both_hold_the_bits_of_one_alone_and_need_fewer_steps(backbones: Sequence[Backbone], alone: Ran) -> None:
    both = on_two(backbones)
    for tensors, said in both:
        assert same(tensors, alone[0]) and outcomes(said) == outcomes(alone[1])
    (_, first), (_, second) = both
    assert [(step.rows, step.jobs) for step in first] == [(step.rows, step.jobs) for step in second]
    assert sum(step.rows for step in first) == sum(step.rows for step in alone[1])
    assert len(first) <= 0.6 * len(alone[1])


@pytest.mark.parametrize("loses", [("", "b"), ("a", "")], ids=["the second rank", "the first rank"])
def test_whom_one_loses_all_lose_and_nobody_else(
    loses: Sequence[str], backbones: Sequence[Backbone], alone: Ran
) -> None:
    (lost,) = filter(None, loses)
    for tensors, said in on_two(backbones, loses):
        failed = [one for step in said for one in step.failed]
        assert [(one.job, "only here" in one.message) for one in failed] == [(lost, True)]
        assert same(tensors, {job: tensor for job, tensor in alone[0].items() if job != lost})


def test_who_is_lost_takes_nobody_out_of_the_step(backbones: Sequence[Backbone]) -> None:
    def first_step(rank: Rank) -> tuple[list[str], list[str]]:
        pack = PackRunner(backbones[rank.rank], ranks=rank)
        for job in jobs()[:2]:  # two micro-batches a step, one on each
            pack.admit(replace(job, config=replace(job.config, batch_size=2)))
        raises_in_step(pack, 0, "" if rank.rank else "a")
        done = pack.step()
        return [one.job for one in done.failed], [one.job for one in done.stepped]

    assert on_both(first_step) == [(["a"], ["b"])] * 2


def test_each_is_told_before_a_forward_what_is_underway_on_the_other_too(backbones: Sequence[Backbone]) -> None:
    def told(rank: Rank) -> list[Mapping[str, int]]:
        pack, found = PackRunner(backbones[rank.rank], ranks=rank), list[Mapping[str, int]]()
        for job in jobs()[:2]:
            pack.admit(replace(job, config=replace(job.config, batch_size=1)))
        pack.underway = found.append
        for _ in range(2):
            pack.step()
        return found

    assert on_both(told) == [[{"a": 0, "b": 0}, {"a": 1, "b": 1}]] * 2

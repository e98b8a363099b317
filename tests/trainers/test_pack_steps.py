"""What a packed step says of itself, who rides in it and on which rank, and whom a pack does not take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor

from polygraft.cluster.store.base import StoreError
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.spec import SpecError
from polygraft.trainers import runner as runner_module
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.ranks import Alone
from polygraft.trainers.runner import PackRunner
from tests.tiny import TINY

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32, training=True)


def a_job(name: str, rows: int, *, text: str = "bitfit", examples: int = 4, batch: int = 1) -> TrainJob:
    """Examples of so many rows, none of which shares a micro-batch with another."""
    sample = Sample((*range(3, 4 + rows),), (0.0, *(1.0,) * rows))
    config = TrainConfig(epochs=1, batch_size=batch, learning_rate=1e-3, micro_rows=rows)
    return TrainJob(name, BoundGraft(parse(text), TINY), config, (sample,) * examples)


def pack_of(backbone: Backbone, *jobs: TrainJob, max_rows: int = 100) -> PackRunner:
    pack = PackRunner(backbone, max_rows=max_rows)
    for job in jobs:
        pack.admit(job)
    return pack


def test_a_step_says_its_number_its_rows_who_rode_and_how_long_it_took(backbone: Backbone) -> None:
    ticks = iter(range(100))
    pack = PackRunner(backbone, max_rows=100, clock=lambda: 2.5 * next(ticks))
    for job in (a_job("b", 7, examples=1), a_job("a", 5), a_job("c", 3, text="bitfit + mezo(0.05)")):
        pack.admit(job)
    first, second = pack.step(), pack.step()
    assert (first.number, first.rows, first.jobs, first.failed, first.seconds) == (1, 18, ("b", "a", "c"), (), 2.5)
    assert [(one.job, one.step, one.skipped) for one in first.stepped] == [
        ("b", 1, False),
        ("a", 1, False),
        ("c", 1, False),
    ]
    assert (second.number, second.rows, second.jobs) == (2, 11, ("a", "c")), "b has no examples left"
    assert second.seconds == 2.5
    while not all(running.finished for running in pack.jobs.values()):
        pack.step()
    idle = pack.step()
    assert (idle.number, idle.rows, idle.jobs, idle.stepped, idle.failed) == (5, 0, (), (), ())


def test_the_least_served_ride_first_while_they_fit_and_the_first_in_any_case(backbone: Backbone) -> None:
    pack = pack_of(backbone, *(a_job(name, 30) for name in "cab"), max_rows=60)
    assert [pack.step().jobs for _ in range(4)] == [("a", "b"), ("c", "a"), ("c", "b"), ("a", "b")]
    wide = pack_of(backbone, a_job("a", 90), a_job("b", 30), a_job("c", 31), max_rows=60)
    assert [(one.jobs, one.rows) for one in (wide.step() for _ in range(3))] == [
        (("a",), 90),
        (("b",), 30),
        (("c",), 31),
    ]


def test_before_jobs_are_stacked_and_before_a_forward_it_is_told_who_is_in_it_and_how_far(backbone: Backbone) -> None:
    pack, told = pack_of(backbone, a_job("a", 5), a_job("b", 7, batch=2)), list[Mapping[str, int]]()
    pack.underway = told.append
    for _ in range(3):
        pack.step()
    assert told == [{"a": 0, "b": 0}, {"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 1}]
    empty = pack_of(backbone)
    empty.underway = told.append
    assert empty.step().jobs == () and len(told) == 4, "nothing is underway there"


def test_jobs_that_come_and_go_between_two_steps_are_stacked_once(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, made, real = PackRunner(backbone), list[list[str]](), Stacks.of

    def counted(residents: Sequence[Resident], *given: Any, **more: Any) -> Stacks:
        made.append([resident.id for resident in residents])
        return real(residents, *given, **more)

    monkeypatch.setattr(Stacks, "of", counted)
    for name in "abcd":
        pack.admit(a_job(name, 5))
    pack.remove("a")
    pack.remove("c")
    assert pack.step().jobs == ("b", "d")
    assert [names for names in made if len(names) > 1] == [["b", "d"]]


def test_of_jobs_that_can_only_be_stacked_apart_the_last_to_come_fails(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, real = pack_of(backbone, a_job("a", 5), a_job("b", 5)), Stacks.of
    pack.step()

    def short(residents: Sequence[Resident], *given: Any, **more: Any) -> Stacks:
        if len(residents) > 2:
            raise MemoryError
        return real(residents, *given, **more)

    monkeypatch.setattr(Stacks, "of", short)
    for name in "cd":
        pack.admit(a_job(name, 5))
    done = pack.step()
    assert [(failed.job, failed.code) for failed in done.failed] == [("d", "out_of_memory"), ("c", "out_of_memory")]
    assert done.jobs == ("a", "b") and not pack.step().failed, "it is said once"


Forward = Callable[[Stacks, Mapping[str, MicroBatch]], Sequence[Collect]]


def with_forward(pack: PackRunner, changed: Callable[[Forward], Forward]) -> None:
    """The pack's lane of gradients computes otherwise."""
    pack._gradient.forward = changed(pack._gradient.forward)  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("error", [StoreError("the store is gone"), RuntimeError("could not create a primitive")])
def test_what_is_nobodys_fault_ends_the_step_at_once_and_no_job(error: Exception, backbone: Backbone) -> None:
    pack, tried = pack_of(backbone, a_job("a", 5), a_job("b", 7)), list[list[str]]()

    def raising(_: Forward) -> Forward:
        def forward(_: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
            tried.append([*batches])
            raise error

        return forward

    with_forward(pack, raising)
    with pytest.raises(type(error), match=str(error)):
        pack.step()
    assert tried == [["a", "b"]] and [*pack.jobs] == ["a", "b"]


def test_what_a_failed_forward_took_is_given_back_before_anything_else_is_tried(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, said = pack_of(backbone, *(a_job(name, 5) for name in "abc")), list[str]()
    pack.step()

    def short(real: Forward) -> Forward:
        def forward(stacks: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
            said.append("".join(batches))
            if "b" in batches:
                raise MemoryError
            return real(stacks, batches)

        return forward

    with_forward(pack, short)
    monkeypatch.setattr(runner_module, "give_back", lambda: said.append("given back"))
    monkeypatch.setattr(runner_module, "bare_forward", lambda _: said.append("bare"))
    done = pack.step()
    back = "given back"
    assert said == ["abc", back, "a", "bc", back, "b", back, "b", back, "bare", "c"]
    assert [(one.job, one.code) for one in done.failed] == [("b", "out_of_memory")]
    assert [one.job for one in done.stepped] == ["a", "c"]
    said.clear()
    pack.remove("b")
    pack.step()
    assert said == [back, "ac"], "and once the stacks are made anew"
    pack.remove("a")
    assert said == [back, "ac"]
    pack.remove("c")
    assert said == [back, "ac", back], "and when the pack is empty"


def test_of_the_gradients_of_a_step_none_is_kept_but_the_newest(backbone: Backbone) -> None:
    pack, alive = pack_of(backbone, *(a_job(name, 5) for name in "abc")), list[int]()

    def watched(real: Forward) -> Forward:
        def forward(stacks: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
            made = list[ReferenceType[Tensor]]()

            def collect(one: Collect) -> Contribution:
                alive.append(sum(gradient() is not None for gradient in made))
                part = one()
                assert part.gradient is not None
                made.append(ref(part.gradient))
                return part

            return [partial(collect, one) for one in real(stacks, batches)]

        return forward

    with_forward(pack, watched)
    pack.step()
    assert alive == [0, 1, 1]


class Two(Alone):
    """The first of two ranks, the other of which is never asked."""

    size = 2


def test_who_cannot_be_stacked_with_the_others_is_refused_at_once_where_ranks_have_to_agree(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, real = PackRunner(backbone, ranks=Two()), Stacks.of
    pack.admit(a_job("a", 5))

    def short(residents: Sequence[Resident], *given: Any, **more: Any) -> Stacks:
        if len(residents) > 1:
            raise MemoryError("two are too many")
        return real(residents, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stacks, "of", short)
        with pytest.raises(MemoryError, match="two are too many"):
            pack.admit(a_job("b", 5))
    assert list(pack.jobs) == ["a"]
    pack.admit(a_job("b", 5))
    assert list(pack.jobs) == ["a", "b"]


def test_micro_batches_of_a_job_ride_on_ranks_of_their_own_the_emptiest_first(backbone: Backbone) -> None:
    pack = PackRunner(backbone, max_rows=60, ranks=Two())

    def riders() -> list[tuple[str, int, int]]:
        found, failed = pack._riders()
        assert not failed
        return [(rider.job, rider.ahead, rider.rank) for rider in found]

    pack.admit(a_job("a", 30, examples=6, batch=3))
    assert riders() == [("a", 0, 0), ("a", 1, 1)]
    pack.admit(a_job("b", 20))
    pack.admit(a_job("c", 30, batch=2))
    assert riders() == [("a", 0, 0), ("a", 1, 1), ("b", 0, 0), ("c", 0, 1)]
    pack.remove("a")
    assert riders() == [("b", 0, 0), ("c", 0, 1), ("c", 1, 0)]


def test_a_job_is_not_taken_twice_nor_for_another_backbone(backbone: Backbone) -> None:
    pack = pack_of(backbone, a_job("a", 5))
    with pytest.raises(ValueError, match="job a is already in the pack"):
        pack.admit(a_job("a", 5))
    other = BoundGraft(parse("bitfit"), replace(TINY, layers=1))
    with pytest.raises(ValueError, match=r"job b is for .*layers=1"):
        pack.admit(replace(a_job("b", 5), graft=other))
    assert list(pack.jobs) == ["a"]
    assert pack.remove("a").job.id == "a" and not pack.jobs and pack.step().jobs == ()


def test_a_backbone_that_says_neither_tokens_nor_labels_trains_nobody(backbone: Backbone) -> None:
    shape = replace(backbone.shape, encoder_layers=1)
    with pytest.raises(SpecError, match="a job learns to say the next token, or a text's label"):
        PackRunner(cast("Backbone", SimpleNamespace(shape=shape)))


def test_a_held_out_loss_is_that_of_the_held_out_examples(backbone: Backbone) -> None:
    job = a_job("a", 5)
    longer = a_job("c", 9).train
    pack = pack_of(backbone, job, replace(a_job("b", 6), held_out=job.train[:1], test=longer))
    held_out, tested = pack.held_out("b"), pack.tested("b")
    assert pack.held_out("a") is pack.tested("a") is None and held_out is not None and tested is not None
    assert held_out.loss == pack.evaluate("b", job.train[:1]) != pack.evaluate("b", longer) == tested.loss


def test_a_classifier_starts_from_its_texts_and_another_job_from_its_tokens_and_their_weights(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, seen = PackRunner(backbone), list[tuple[object, object]]()

    def noted(*given: Any, **more: Any) -> Mapping[str, Tensor]:
        seen.append((more["samples"], more["weights"]))
        return initialise(*given, **more)

    monkeypatch.setattr(runner_module, "initialise", noted)
    pack.admit(a_job("a", 5, examples=1))
    head = Head(("bad", "good"), "linear")
    graft = BoundGraft(replace(parse("bitfit"), head=head), backbone.shape)
    pack.admit(replace(a_job("b", 5), graft=graft, train=(Sample.labelled((5, 6, 7), 1, head),)))
    assert seen == [([(3, 4, 5, 6, 7, 8)], [(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)]), ([(5, 6, 7)], [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grafts_that_add_nothing_yet_are_judged_once_with_the_bits_of_each(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one validation file; who adds something as it starts, has learnt or has other examples is judged by itself."""
    texts = ["lora(r=4)", "lora(r=8, at=attn.q)@0", "serial(8)", "lora(r=2) + parallel(4)", "prefix(3)", "vera(r=8)"]
    held_out = tuple(a_job("held-out", rows).train[0] for rows in (9, 5, 7))
    pack = PackRunner(Backbone.load(folder, dtype, training=True), max_rows=15)
    for place, text in enumerate((*texts, "lora(r=4)")):
        pack.admit(replace(a_job(f"{place}", 5, text=text), held_out=held_out[: None if place < len(texts) else 2]))
    each, judged = {job: pack.held_out(job) for job in pack.jobs}, list[str]()
    real = pack._judged

    def counted(job: str, samples: Sequence[Sample]) -> Judgement:
        judged.append(job)
        return real(job, samples)

    monkeypatch.setattr(pack, "_judged", counted)
    assert {job: pack.untrained(job) for job in pack.jobs} == each
    assert judged == ["0", "4", "5", "6"]
    pack.step()
    assert pack.untrained("0") == pack.held_out("0") != each["0"]

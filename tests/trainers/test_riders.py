"""Who rides in a packed step by what it took before and by the memory that is left, and who is let in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.cluster.policy.budget import state_bytes
from polygraft.cluster.store.base import StoreError
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.job import Sample
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.runner import PackRunner
from tests.tiny import TINY
from tests.trainers.test_pack_steps import Forward, Two, a_job, pack_of, with_forward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32, training=True)


def unstackable(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    real = Stacks.of

    def of(residents: Sequence[Resident], *given: Any, **more: Any) -> Stacks:
        if job in [resident.id for resident in residents]:
            raise ValueError("these tensors cannot be")
        return real(residents, *given, **more)

    monkeypatch.setattr(Stacks, "of", of)


def test_a_job_of_half_the_rows_rides_twice_as_often(backbone: Backbone) -> None:
    pack = pack_of(backbone, a_job("a", 60), a_job("b", 30), max_rows=60)
    assert [pack.step().jobs for _ in range(6)] == [("a",), ("b",), ("b",), ("a",), ("b",), ("b",)]


def test_what_a_job_s_state_takes_is_there_for_forwards_once_it_has_left(backbone: Backbone) -> None:
    jobs = [a_job(name, 5, text="lora(r=8, at=attn.*|ffn.*)") for name in "abcd"]
    state = state_bytes(jobs[0].graft.parameters, jobs[0].graft.frozen)
    measured = PackRunner(backbone, max_bytes=1 << 40)
    forward = measured.memory.bytes("a", measured.admit(jobs[0]).micro_batch(0))
    assert state < forward < 2 * state
    pack = PackRunner(backbone, max_bytes=4 * state + forward)
    for job in jobs:
        pack.admit(job)
    assert pack.step().jobs == ("a",)
    pack.remove("a")
    assert pack.step().jobs == ("b",)
    pack.remove("b")
    assert pack.step().jobs == ("c", "d")


def test_who_cannot_be_computed_beside_the_others_tensors_is_computed_without_them(backbone: Backbone) -> None:
    jobs = [a_job(name, rows, text="lora(r=2)", batch=2) for name, rows in (("a", 5), ("b", 7))]
    pack, undisturbed = pack_of(backbone, *jobs), pack_of(backbone, *jobs)

    def crowded(real: Forward) -> Forward:
        def forward(stacks: Stacks, batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
            if len(stacks.residents) > 1:
                raise MemoryError
            return real(stacks, batches)

        return forward

    with_forward(pack, crowded)
    for _ in range(4):
        assert pack.step().stepped == undisturbed.step().stepped
    for job in ("a", "b"):
        assert torch.equal(pack.jobs[job].slab.master, undisturbed.jobs[job].slab.master)


def test_a_job_that_cannot_be_trained_here_is_told_as_it_joins_and_is_out(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, good = PackRunner(backbone), a_job("a", 5)
    assert pack.admit(good).job is good
    strange = replace(a_job("b", 5), train=(Sample((3, TINY.vocab), (0.0, 1.0)),))
    with pytest.raises(ValueError, match=str(TINY.vocab)):
        pack.admit(strange)
    with monkeypatch.context() as patch:
        unstackable(patch, "b")
        with pytest.raises(ValueError, match="these tensors cannot be"):
            pack.admit(a_job("b", 5))
    assert [*pack.jobs] == ["a"] and pack.step().jobs == ("a",)


def test_a_job_that_left_before_the_step_that_would_have_said_so_does_not_fail_there(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackRunner(backbone, ranks=Two())
    pack.admit(a_job("a", 5))
    unstackable(monkeypatch, "a")
    pack.admit(a_job("b", 5))
    pack.remove("a")
    done = pack.step()
    assert (done.failed, done.jobs) == ((), ("b",))


def test_a_job_whose_own_tensors_can_no_longer_be_stacked_fails_alone_with_the_reason(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_of(backbone, *(a_job(name, 5) for name in "abc"))
    pack.step()
    pack.remove("c")
    unstackable(monkeypatch, "a")
    done = pack.step()
    assert [(one.job, "these tensors cannot be" in one.message) for one in done.failed] == [("a", True)]
    assert done.jobs == ("b",)


@pytest.mark.parametrize(("together", "alone"), [(StoreError, None), (MemoryError, StoreError), (MemoryError, None)])
def test_nobody_fails_for_what_no_job_can_help(
    together: type[Exception], alone: type[Exception] | None, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for what those who have all stepped together, and none of them alone, raises."""
    pack, real = pack_of(backbone, *(a_job(name, 5) for name in "abc")), Stacks.of
    pack.step()
    pack.remove("c")

    def of(residents: Sequence[Resident], *given: Any, **more: Any) -> Stacks:
        if (error := together if len(residents) > 1 else alone) is not None:
            raise error("for all")
        return real(residents, *given, **more)

    monkeypatch.setattr(Stacks, "of", of)
    with pytest.raises(alone or together, match="for all"):
        pack.step()
    assert [*pack.jobs] == ["a", "b"]

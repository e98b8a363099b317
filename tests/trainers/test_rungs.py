"""Rungs: a job that ends at one, and jobs that go on from there, in its pack or another, compute the bits of one that
never stopped; nobody beside them notices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.rung import Rung
from polygraft.cluster.states import JobState
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.trainers import rungs
from polygraft.trainers.job import TrainJob
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit_again
from tests.trainers.test_moving import MOVED, OTHER, Packs
from tests.trainers.test_packed_equals_alone import a_job, alone, assert_as_alone, pack_of, run

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
SOURCES = {"lora": "lora(r=4, at=attn.*, dropout=0.2) + serial(4)", "mezo": "prefix(4) + mezo(0.05)"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    torch.set_num_threads(1)
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32, training=True)


def explored(job: TrainJob, name: str, factor: float) -> TrainJob:
    return replace(job, id=name, config=replace(job.config, learning_rate=factor * job.config.learning_rate))


def at_step(backbone: Backbone, job: TrainJob, step: int) -> RunningJob:
    """The job alone after so many steps."""
    pack = pack_of(backbone, [job])
    while pack.jobs[job.id].step < step:
        pack.step()
    return pack.jobs[job.id]


@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_in_the_pack_goes_on_with_the_bits_of_its_source_and_the_others_keep_theirs(
    source: str, backbone: Backbone
) -> None:
    job = a_job(source, SOURCES[source], seed=3, steps=STEPS)
    others = [a_job("dora", "dora(r=2, at=attn.v)", seed=1, steps=STEPS), a_job("ia3", "ia3", seed=2, steps=STEPS)]
    copy, other_rate = replace(job, id="copy"), explored(job, "explored", 0.5)
    pack, moments = pack_of(backbone, [others[0], job, others[1]]), {}

    def between(pack: PackRunner) -> None:
        running = pack.jobs.get(source)
        if running is not None and running.step == STEPS // 2 and not running.micro and "copy" not in forked:
            for one in (copy, other_rate):
                pack.restore(running.forked(one))
                forked.append(one.id)
        moments.update({name: one.slab.exp_avg_sq for name, one in pack.jobs.items()})

    forked: list[str] = []
    ended = run(pack, between)
    assert_as_alone({name: ended[name] for name in (source, "dora", "ia3")}, [job, *others], backbone)
    assert torch.equal(ended["copy"], ended[source])
    assert torch.equal(moments["copy"], moments[source])
    # One that was never copied, and whose rate was changed under way.
    changed = at_step(backbone, job, STEPS // 2)
    changed.job = other_rate
    alone_pack = PackRunner(backbone)
    alone_pack.restore(changed)
    assert torch.equal(ended["explored"], run(alone_pack)["explored"])
    assert not torch.equal(ended["explored"], ended[source])


@pytest.mark.parametrize("source", SOURCES)
def test_a_job_that_ends_at_its_rung_and_goes_on_in_another_pack_is_one_that_never_stopped(
    source: str, backbone: Backbone, tmp_path: Path
) -> None:
    whole = a_job(source, SOURCES[source], seed=3, steps=STEPS)
    neighbour = a_job("neighbour", "lora(r=2)", seed=1, steps=STEPS)
    first = replace(whole, config=replace(whole.config, until=0.4))
    pack, folders = pack_of(backbone, [first, neighbour]), Folders(tmp_path)

    ended: dict[str, RunningJob] = {}
    while pack.jobs:
        pack.step()
        for running in [one for one in pack.jobs.values() if one.finished]:
            ended[running.job.id] = pack.remove(running.job.id)
    rungs.keep(folders, ended[source], device_class="one")
    assert ended[source].step == first.last_step < whole.steps_total
    assert torch.equal(ended["neighbour"].slab.master, alone(backbone, neighbour))
    other = PackRunner(backbone)
    last = replace(whole, id="last")
    other.restore(rungs.go_on(folders, last, source))
    assert torch.equal(run(other)["last"], alone(backbone, whole))


def test_what_goes_on_must_be_what_stopped_in_all_that_its_state_means(backbone: Backbone, tmp_path: Path) -> None:
    job = a_job("source", "lora(r=2)", seed=1, steps=2)
    running = RunningJob(job, at_step(backbone, job, 1).slab)
    for other in (
        replace(job, id="b", train=job.train[:-1]),
        replace(job, id="b", config=replace(job.config, seed=9)),
        a_job("b", "lora(r=3)", seed=1, steps=2),
    ):
        with pytest.raises(ValueError, match="which it goes on from"):
            running.forked(other)
    with pytest.raises(rungs.RungGone, match=r"rung\.after: the state of source is gone"):
        rungs.go_on(Folders(tmp_path), job, "source")


def test_through_workers_the_graft_at_the_end_is_that_of_a_job_without_rungs(
    backbone: Backbone, tmp_path: Path
) -> None:
    """In two packs, the second of which has never seen the first job: the graft's id is a digest of its tensors."""
    packs = Packs(backbone, tmp_path)
    whole = MOVED[1]
    submit_again(packs.store, "ftjob-half", whole, Rung(until=0.5), PACK)
    packs.close(PACK)
    packs.work(PACK)
    half = packs.job("ftjob-half")
    assert half.state is JobState.SUCCEEDED and half.graft != packs.job(whole).graft
    assert 0 < half.step < packs.job(whole).step
    submit_again(packs.store, "ftjob-rest", whole, Rung(after="ftjob-half"), OTHER)
    submit_again(packs.store, "ftjob-none", whole, Rung(until=0.0), OTHER)
    submit_again(packs.store, "ftjob-lost", whole, Rung(after="ftjob-never"), OTHER)
    packs.close(OTHER)
    packs.work(OTHER)
    rest, lost = packs.job("ftjob-rest"), packs.job("ftjob-lost")
    assert (rest.graft, rest.step, rest.loss_before) == (
        packs.job(whole).graft,
        packs.job(whole).step,
        packs.job(whole).loss_before,
    )
    none = packs.job("ftjob-none")  # judged as it starts
    assert (none.state, none.step, none.loss_after) == (JobState.SUCCEEDED, 0, none.loss_before)
    assert lost.error is not None and (lost.error.code, lost.error.param) == ("rung_gone", "rung.after")

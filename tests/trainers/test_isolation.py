"""One job's fault is its own: wherever a packed step may raise, its job fails and no other one's bits change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import FileId, Job, JobError, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import checkpoint
from polygraft.trainers import worker as worker_module
from polygraft.trainers.job import Sample
from polygraft.trainers.memory import Memory, TooLarge
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from polygraft.trainers.worker import PackWorker
from tests.tiny import tiny_llama
from tests.trainers.faults_of_a_job import BAD, FAULTS, SAID, spoil_weights
from tests.trainers.submitted import PACK, submit, submit_text
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, run

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = {"ftjob-0": "lora(r=4, at=attn.*)", "ftjob-2": "prefix(4) + mezo(0.05)", "ftjob-3": "vera(r=4)"}
FAILS = JobId("ftjob-1")
OWN = "7"  # in an answer of its own
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 10))]
WITHOUT_A_BACKWARD = {"in_the_backward", "in_its_gradient"}
PLACES = [(fault, peft) for peft in BAD for fault in FAULTS if peft == BAD[0] or fault not in WITHOUT_A_BACKWARD]
ELSEWHERE = {"in_its_publication": "graft_not_saved", "in_its_checkpoint": "checkpoint_not_saved"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32, training=True)


@pytest.fixture(scope="module")
def undisturbed(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Mapping[JobId, Job]]:
    """What becomes of the good jobs beside one that does nothing wrong, by the seed."""

    @cache
    def jobs(seed: int) -> Mapping[JobId, Job]:
        ended = ran(backbone, tmp_path_factory.mktemp("calm"), BAD[0], seed)
        assert all(job.state is JobState.SUCCEEDED for job in ended.values())
        return ended

    return jobs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_what_a_job_makes_a_step_raise_fails_that_job_alone(
    place: tuple[str, str],
    seed: int,
    backbone: Backbone,
    undisturbed: Callable[[int], Mapping[JobId, Job]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (fault, peft), expected = place, undisturbed(seed)
    FAULTS[fault](monkeypatch, own_token(backbone), seed % 3)
    told = failed_alone(ran(backbone, tmp_path, peft, seed), expected)
    assert told.code == ELSEWHERE.get(fault, "step_failed")
    assert f"OwnFault: {SAID}" in told.message
    assert "step " in told.message or fault == "in_its_publication"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("peft", BAD)
def test_a_job_whose_weights_turn_to_nan_fails_alone(
    peft: str,
    seed: int,
    backbone: Backbone,
    undisturbed: Callable[[int], Mapping[JobId, Job]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = undisturbed(seed)
    spoil_weights(monkeypatch, seed % 3)
    told = failed_alone(ran(backbone, tmp_path, peft, seed), expected)
    assert told.code == "non_finite_loss"


def test_a_job_with_a_token_that_the_backbone_does_not_have_fails_alone(
    undisturbed: Callable[[int], Mapping[JobId, Job]], tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "backbone")
    saved = json.loads((folder / "tokenizer.json").read_text())
    more = {**saved["added_tokens"][0], "id": 512, "content": "<NEW>", "special": False}
    saved["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    store = MemoryStore()
    submit(store, tmp_path, in_order(BAD[0]))
    file = tmp_path / "files" / f"file-{FAILS}.jsonl"
    file.write_text(file.read_text().replace("A shoot.", "A <NEW> shoot."))
    work(store, Backbone.load(folder, torch.float32, training=True), tmp_path)
    told = failed_alone(jobs_of(store), undisturbed(0))
    assert "512" in told.message and told.code == "invalid_training_data"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_job_whose_file_was_deleted_before_its_pack_read_it_fails_alone_and_says_which(
    param: str, backbone: Backbone, undisturbed: Callable[[int], Mapping[JobId, Job]], tmp_path: Path
) -> None:
    """The file is deleted after it was checked and before the job's record is there, which would keep it."""
    store = MemoryStore()
    submit(store, tmp_path, in_order(BAD[0]))
    found = store.get(keys.job(FAILS))
    assert found is not None
    spec = replace(found.value.spec, **{param: FileId("file-gone")})  # type: ignore[arg-type]
    store.commit([Write(keys.job(FAILS), replace(found.value, spec=spec), found.version)])
    work(store, backbone, tmp_path)
    told = failed_alone(jobs_of(store), undisturbed(0))
    assert (told.code, told.param) == ("invalid_training_data", param)
    assert told.message == f"{param}: the content of file-gone is gone; upload it again"


@pytest.mark.parametrize("token", [512, -1])
def test_a_runner_takes_no_token_outside_the_embedding(token: int, backbone: Backbone) -> None:
    job = a_job("bad", "lora(r=2)", seed=0, steps=1)
    bad = Sample((3, token, 4), (0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=rf"training_file: token {token} of example {len(job.train) + 1}"):
        PackRunner(backbone).admit(replace(job, train=(*job.train, bad)))
    with pytest.raises(ValueError, match=f"validation_file: token {token} of example 1"):
        PackRunner(backbone).admit(replace(job, held_out=(bad,)))


def test_an_example_that_no_pack_could_compute_is_refused_with_its_numbers(
    backbone: Backbone, undisturbed: Callable[[int], Mapping[JobId, Job]], tmp_path: Path
) -> None:
    store, bytes = MemoryStore(), 40 << 20
    submit_all(store, tmp_path)
    submit_text(store, tmp_path, "ftjob-long", "lora(r=2)", ["short", "graft " * 500], max_length=500)
    store.append(keys.commands(PACK), {"op": "close", "job": ""})
    worker_of(store, backbone, tmp_path, max_bytes=bytes).run(lambda: None)
    assert {i: job.graft for i, job in jobs_of(store).items()} == {i: job.graft for i, job in undisturbed(0).items()}
    record = store.get(keys.job(JobId("ftjob-long")))
    assert record is not None and record.value.state is JobState.FAILED and record.value.error is not None
    told, graft = record.value.error, BoundGraft(parse("lora(r=2)"), backbone.shape)
    needs = StepCost(graft, 4).bytes([499])
    assert (told.code, told.param) == ("out_of_memory", "training_file")
    for said in ("example 2 has 500 tokens", f"{needs:,} bytes", f"{bytes - 16 * graft.parameters:,} for it"):
        assert said in told.message


def test_a_jobs_micro_batches_are_split_until_they_fit_whoever_shares_the_pack(backbone: Backbone) -> None:
    job = a_job("a", "lora(r=2)", seed=3, steps=2)
    assert job.config.micro_rows == 40
    cost, state = StepCost(job.graft, 4), 16 * job.graft.parameters
    longest = max(sample.rows for sample in job.train)
    assert 20 < longest < 40
    whole, least = cost.bytes([longest] * 2) + state, cost.bytes([longest]) + state
    for bytes, rows in ((None, 40), (whole, 40), (whole - 1, 20), (least, 20)):
        assert Memory(bytes, 4).fitted(job).config.micro_rows == rows
    with pytest.raises(TooLarge):
        Memory(least - 1, 4).fitted(job)


def test_jobs_whose_micro_batches_do_not_fit_together_ride_apart_with_the_same_bits(backbone: Backbone) -> None:
    jobs = [a_job(f"{i}", peft, seed=i, steps=3) for i, peft in enumerate(("lora(r=2)", "ia3", "lora(r=3) + mezo"))]
    pack = PackRunner(backbone, max_bytes=1)
    for job in jobs:
        pack.admit(job)
    assert [len(pack.step().jobs) for _ in range(3)] == [1, 1, 1]
    assert_as_alone(run(pack), jobs, backbone)


def test_a_job_that_can_be_stacked_no_more_falls_out_when_another_joins(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, bad, last = (
        a_job(name, "lora(r=2)" if name != "bad" else "vera(r=2)", seed=i, steps=6)
        for i, name in enumerate(("first", "bad", "last"))
    )
    pack = PackRunner(backbone)
    pack.admit(first)
    pack.admit(bad)
    pack.step()
    real = Stacks.refresh

    def refresh(stacks: Stacks, graft: int) -> None:
        if stacks.residents[graft].id == "bad":
            raise ValueError("singular")
        real(stacks, graft)

    with monkeypatch.context() as patch:
        patch.setattr(Stacks, "refresh", refresh)
        pack.admit(last)
        done = pack.step()
        assert [(failed.job, failed.code) for failed in done.failed] == [("bad", "step_failed")]
        assert "step " in done.failed[0].message and "ValueError: singular" in done.failed[0].message
        pack.remove("bad")
        ended = run(pack)
    assert_as_alone(ended, [first, last], backbone)


def test_a_job_that_raises_while_it_joins_is_not_in_the_pack(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackRunner(backbone)
    good = a_job("good", "lora(r=2)", seed=0, steps=3)
    pack.admit(good)
    real = Stacks.refresh

    def refresh(stacks: Stacks, graft: int) -> None:
        if stacks.residents[graft].id == "bad":
            raise ZeroDivisionError
        real(stacks, graft)

    with monkeypatch.context() as patch:
        patch.setattr(Stacks, "refresh", refresh)
        with pytest.raises(ZeroDivisionError):
            pack.admit(a_job("bad", "lora(r=3)", seed=1, steps=3))
    assert list(pack.jobs) == ["good"]
    assert_as_alone(run(pack), [good], backbone)


def test_what_only_company_raises_fails_nobody(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [a_job(f"{i}", peft, seed=i, steps=3) for i, peft in enumerate(("lora(r=2)", "ia3", "lora(r=3) + mezo"))]
    pack, real = PackRunner(backbone), Backbone.forward
    for job in jobs:
        pack.admit(job)

    def forward(backbone: Backbone, rows: Any, stacks: Stacks, *given: Any) -> Any:
        if len({resident.id for resident in stacks.residents}) > 1:
            raise RuntimeError("not in company")
        return real(backbone, rows, stacks, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "forward", forward)
        ended = run(pack)
    assert_as_alone(ended, jobs, backbone)


def test_a_backbone_that_raises_without_any_job_is_no_jobs_fault(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackRunner(backbone)
    pack.admit(a_job("a", "lora(r=2)", seed=0, steps=3))
    pack.admit(a_job("b", "ia3", seed=1, steps=3))

    def broken(*_: object) -> None:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(Backbone, "forward", broken)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        pack.step()


def test_a_job_keeps_its_newest_two_checkpoints_and_the_one_that_the_manifest_names(
    backbone: Backbone, tmp_path: Path
) -> None:
    running = PackRunner(backbone).admit(a_job("a", "ia3", seed=0, steps=9))
    names: list[str] = []
    for step in range(1, 6):
        running.step = step
        names.append(checkpoint.save(tmp_path, running, names[0] if names else None))
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *names[-2:]]


def test_a_job_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    backbone: Backbone,
    undisturbed: Callable[[int], Mapping[JobId, Job]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    store, real = MemoryStore(), checkpoint.load
    restored: list[tuple[str, str]] = []

    class Killed(BaseException):
        pass

    def dies() -> None:
        if len(list((tmp_path / "jobs" / "ftjob-0").glob("checkpoint-*"))) == 2:
            raise Killed

    submit_all(store, tmp_path)
    with pytest.raises(Killed):
        worker_of(store, backbone, tmp_path).run(dies)
    older, newest = sorted((tmp_path / "jobs" / "ftjob-0").glob("checkpoint-*"))
    (newest / "slab.safetensors").write_bytes(b"torn")

    def load(folder: Path, name: str, *given: Any) -> RunningJob:
        running = real(folder, name, *given)
        restored.append((running.job.id, name))
        return running

    monkeypatch.setattr(checkpoint, "load", load)
    work(store, backbone, tmp_path)
    assert ("ftjob-0", older.name) in restored
    assert {id_: job.graft for id_, job in jobs_of(store).items()} == {i: j.graft for i, j in undisturbed(0).items()}


def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_one_before_and_the_job_goes_on(
    backbone: Backbone,
    undisturbed: Callable[[int], Mapping[JobId, Job]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    real = checkpoint.save

    def save(folder: Path, running: RunningJob, *given: Any, **more: Any) -> str:
        if running.step > 2:
            raise OSError(5, "Input/output error")
        return real(folder, running, *given, **more)

    monkeypatch.setattr(checkpoint, "save", save)
    ended = ran(backbone, tmp_path, BAD[0], 0)
    assert {id_: job.graft for id_, job in ended.items()} == {id_: job.graft for id_, job in undisturbed(0).items()}


def in_order(peft: str) -> Mapping[str, str]:
    return {job: (GOOD | {FAILS: peft})[job] for job in sorted((*GOOD, FAILS))}


def ran(backbone: Backbone, data: Path, peft: str, seed: int) -> Mapping[JobId, Job]:
    """What became of the good jobs and, second among them, one of this graft."""
    store = MemoryStore()
    submit_all(store, data, peft, seed)
    work(store, backbone, data)
    return jobs_of(store)


def submit_all(store: Store, data: Path, peft: str = BAD[0], seed: int = 0) -> None:
    submit(store, data, in_order(peft), seed=seed)
    file = data / "files" / f"file-{FAILS}.jsonl"
    file.write_text(file.read_text().replace("A shoot.", f"A shoot {OWN}."))


def work(store: Store, backbone: Backbone, data: Path) -> None:
    store.append(keys.commands(PACK), {"op": "close", "job": ""})
    worker_of(store, backbone, data).run(lambda: None)


def worker_of(store: Store, backbone: Backbone, data: Path, max_bytes: int | None = None) -> PackWorker:
    runner = PackRunner(backbone, max_rows=512, max_bytes=max_bytes)
    tokeniser = Tokeniser.load(backbone.folder)
    return PackWorker(PACK, runner, tokeniser, store, folders=Folders(data), micro_rows=128)


def jobs_of(store: Store) -> Mapping[JobId, Job]:
    found = {job: store.get(keys.job(JobId(job))) for job in in_order(BAD[0])}
    return {JobId(job): record.value for job, record in found.items() if record is not None}


def failed_alone(ended: Mapping[JobId, Job], expected: Mapping[JobId, Job]) -> JobError:
    """Why the bad job failed; the good ones published the tensors of the undisturbed run."""
    for job in map(JobId, GOOD):
        assert (ended[job].state, ended[job].graft) == (JobState.SUCCEEDED, expected[job].graft), ended[job].error
    error = ended[FAILS].error
    assert ended[FAILS].state is JobState.FAILED and error is not None
    return error


@cache
def own_token(backbone: Backbone) -> int:
    """One that only the bad job's examples have."""
    return Tokeniser.load(backbone.folder).encode_text(OWN)[-1]

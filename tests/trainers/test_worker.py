"""The pack's worker over the in-memory store: what a job's tenant sees, and what a crash may not change."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import JobCancelRequested
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import Job, JobError, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, StoreUnavailable
from polygraft.cluster.store.memory import MemoryStore
from polygraft.cluster.story import story
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.kernels.dense.device_class import device_class
from polygraft.trainers import publishing as publishing_module
from polygraft.trainers import runner as runner_module
from polygraft.trainers import worker as worker_module
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.kernels.compare import relative
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit, submit_one

PEFT = "method.supervised.hyperparameters.peft"
METHODS = ("lora(r=4, at=attn.*)", "ia3", "prefix(4)")


class Crash(BaseException):
    """Stands for the process dying at a point."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def test_jobs_of_a_pack_end_published_with_a_lower_held_out_loss(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {f"ftjob-{i}": peft for i, peft in enumerate(METHODS)})
    _work(store, backbone, tmp_path)
    for job in _jobs(store):
        assert job.state is JobState.SUCCEEDED and job.model == f"{job.id}@1"
        assert job.loss_before is not None and job.loss_after is not None and job.loss_after < job.loss_before
        assert (tmp_path / "grafts" / str(job.graft) / "graft.safetensors").exists()
    lines = [json.loads(line) for line in (tmp_path / "packs" / PACK / "steps.jsonl").read_text().splitlines()]
    assert max(len(line["jobs"]) for line in lines) == len(METHODS)
    entries = store.read(keys.metrics(JobId("ftjob-0")))
    assert [entry["step"] for _, entry in entries] == list(range(1, len(entries) + 1))


@pytest.mark.parametrize("at", ["save", "publish"])
def test_a_worker_that_dies_before_publication_resumes_to_the_same_weights(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    calm, stormy = MemoryStore(), MemoryStore()
    submit(calm, tmp_path / "calm", {f"ftjob-{i}": peft for i, peft in enumerate(METHODS)})
    _work(calm, backbone, tmp_path / "calm")

    submit(stormy, tmp_path / "stormy", {f"ftjob-{i}": peft for i, peft in enumerate(METHODS)})
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    with monkeypatch.context() as patch:
        target = native if at == "save" else publishing_module
        patch.setattr(target, at, _crash)
        with pytest.raises(Crash):
            _work(stormy, backbone, tmp_path / "stormy")
    _work(stormy, backbone, tmp_path / "stormy")
    assert [(j.state, j.graft, j.model) for j in _jobs(stormy)] == [(j.state, j.graft, j.model) for j in _jobs(calm)]


def test_a_pack_that_starts_again_on_another_class_of_device_says_so_and_goes_on(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tolerance that two classes are equal to; within a class nothing is said."""
    calm, moved = MemoryStore(), MemoryStore()
    submit(calm, tmp_path / "calm", {"ftjob-0": "lora(r=4)"})
    _work(calm, backbone, tmp_path / "calm")

    submit(moved, tmp_path / "moved", {"ftjob-0": "lora(r=4)"})
    moved.append(keys.commands(PACK), {"op": "close", "job": ""})
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    for step in (2, 4):  # the second time from the checkpoint of the first, in the same class
        checkpoint = tmp_path / "moved" / "jobs" / "ftjob-0" / f"checkpoint-{step:08d}"
        with pytest.raises(Crash):
            _worker(moved, backbone, tmp_path / "moved").run(lambda at=checkpoint: _crash() if at.exists() else None)  # type: ignore[misc]
    here, threads = str(device_class()), torch.get_num_threads()
    assert not [line for line in story(moved, "ftjob-0") if "goes on" in line]
    torch.set_num_threads(threads + 1)
    try:
        _work(moved, backbone, tmp_path / "moved")
        there = str(device_class())
    finally:
        torch.set_num_threads(threads)
    (told,) = (line for line in story(moved, PACK) if "goes on" in line)
    assert told.endswith(f"ftjob-0 goes on in {PACK} on {there}; its steps so far are of {here}")
    assert [message for message in _messages(moved) if there in message and here in message]
    assert [(job.state, job.device_class) for job in (*_jobs(calm), *_jobs(moved))] == [
        (JobState.SUCCEEDED, here),
        (JobState.SUCCEEDED, there),
    ]
    one, other = (
        native.load(tmp_path / where / "grafts" / str(job.graft), shape=backbone.shape, backbone=backbone.fingerprint)
        for where, store in (("calm", calm), ("moved", moved))
        for job in _jobs(store)
    )
    assert all(relative(other.tensors[name], value) < 1e-5 for name, value in one.tensors.items())


def test_crashes_between_checkpoints_and_manifest_lose_no_job(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, stormy = MemoryStore(), MemoryStore()
    submit(calm, tmp_path / "calm", {"ftjob-0": "lora(r=4)"})
    _work(calm, backbone, tmp_path / "calm")

    submit(stormy, tmp_path / "stormy", {"ftjob-0": "lora(r=4)"})
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    saved = tmp_path / "stormy" / "jobs" / "ftjob-0"
    real = Manifest.save

    def save(manifest: Manifest, folder: Path) -> None:
        if (saved / "checkpoint-00000003").exists():
            raise Crash
        real(manifest, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", save)
        with pytest.raises(Crash):
            _work(stormy, backbone, tmp_path / "stormy")
        (saved / "checkpoint-00000003").rename(saved / "checkpoint-00000008")  # as if it had got further, twice
        shutil.copytree(saved / "checkpoint-00000008", saved / "checkpoint-00000009")
        patch.setattr(Manifest, "save", _crash)
        with pytest.raises(Crash):
            _work(stormy, backbone, tmp_path / "stormy")
    _work(stormy, backbone, tmp_path / "stormy")
    assert [(job.state, job.graft) for job in _jobs(stormy)] == [(job.state, job.graft) for job in _jobs(calm)]


@pytest.mark.parametrize("at", ["advance_job", "_drop"])
def test_a_worker_that_dies_while_it_cancels_a_job_cancels_it_when_it_is_back(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    with monkeypatch.context() as patch:

        def cancel() -> None:
            if list((tmp_path / "jobs" / "ftjob-0").glob("checkpoint-*")):
                advance_job(store, JobCancelRequested(job=JobId("ftjob-0"), at=2.0))
                store.append(keys.commands(PACK), {"op": "cancel", "job": "ftjob-0"})
                store.append(keys.commands(PACK), {"op": "close", "job": ""})
                patch.setattr(PackWorker if at == "_drop" else worker_module, at, _crash)

        with pytest.raises(Crash):
            _worker(store, backbone, tmp_path).run(cancel)
    _work(store, backbone, tmp_path)
    assert [job.state for job in _jobs(store)] == [JobState.CANCELLED]
    assert not (tmp_path / "jobs" / "ftjob-0").exists()


def test_a_worker_that_dies_while_it_fails_a_job_takes_it_up_from_its_checkpoint(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    with monkeypatch.context() as patch:

        def full(*_args: object, **_more: object) -> str:
            patch.setattr(worker_module, "advance_job", _crash)
            raise OSError("no space left")

        patch.setattr(native, "save", full)
        with pytest.raises(Crash):
            _work(store, backbone, tmp_path)
    _work(store, backbone, tmp_path)
    assert [job.state for job in _jobs(store)] == [JobState.SUCCEEDED]


def test_bad_training_data_fails_its_job_naming_the_line_and_no_other_job(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "ia3"})
    (tmp_path / "files" / "file-ftjob-1.jsonl").write_text('{"messages": 3}\n')
    _work(store, backbone, tmp_path)
    told = _failed_alone(store)
    assert "line 1" in told.message


@pytest.mark.parametrize("at", ["runner.initialise", "running.Hooks"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_job_that_no_memory_is_left_for_fails_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: Exception
) -> None:
    _raise_for("lora(r=9)", error, at, monkeypatch)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "lora(r=9)"})
    _work(store, backbone, tmp_path)
    told = _failed_alone(store)
    assert told.code == "out_of_memory" and "lora(r=9)" in told.message


def test_a_graft_that_no_memory_could_hold_fails_its_job(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": f"lora(r={2**31 - 1})", "ftjob-1": f"serial({2**31 - 1})"})
    _work(store, backbone, tmp_path)
    assert [job.error is not None and job.error.code for job in _jobs(store)] == ["out_of_memory"] * 2


def test_a_job_whose_first_held_out_loss_is_not_finite_fails_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner_module.judge  # type: ignore[attr-defined]

    def judge(backbone: Backbone, graft: BoundGraft, *given: Any) -> Judgement:
        found = real(backbone, graft, *given)
        return replace(found, loss=math.nan) if graft.spec.method == "lora(r=9)" else found

    monkeypatch.setattr(runner_module, "judge", judge)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "lora(r=9)"})
    _work(store, backbone, tmp_path)
    told = _failed_alone(store)
    assert told.param == PEFT
    assert "lora(r=9)" in told.message and "held-out loss of nan" in told.message


@pytest.mark.parametrize("at", ["runner.initialise", "running.Hooks"])
@pytest.mark.parametrize("error", [TypeError("size"), OverflowError("10**30"), RuntimeError("overflow")])
def test_a_job_that_cannot_start_for_any_reason_of_its_own_fails_alone_and_says_why(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: Exception
) -> None:
    _raise_for("lora(r=9)", error, at, monkeypatch)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "lora(r=9)"})
    _work(store, backbone, tmp_path)
    told = _failed_alone(store)
    assert told.param == PEFT
    assert "'lora(r=9)'" in told.message and f"{type(error).__name__}: {error}" in told.message


def test_a_job_whose_examples_may_reach_beyond_the_last_position_fails_alone(
    backbone: Backbone, tmp_path: Path
) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "prefix(511)"})
    _work(store, backbone, tmp_path)
    told = _failed_alone(store)
    assert "max_length: 2 tokens and the 511" in told.message


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), torch.AcceleratorError("CUDA error: unknown")])
def test_the_loss_of_the_store_or_the_device_is_not_blamed_on_a_job(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _raise_for("ia3", error, "runner.initialise", monkeypatch)
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    with pytest.raises(type(error)):
        _work(store, backbone, tmp_path)
    assert not _jobs(store)[0].final


@pytest.mark.parametrize("at", ["runner.initialise", "running.Hooks"])
def test_a_product_that_cannot_be_compiled_ends_the_worker_which_the_next_one_knows_of(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """No other job could use that product in this process either, so it ends as one that is killed does."""
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "lora(r=9)"})
    with monkeypatch.context() as patched:
        _raise_for("lora(r=9)", RuntimeError("could not create a primitive"), at, patched)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="primitive"):
                _work(store, backbone, tmp_path)
        _work(store, backbone, tmp_path)
    assert _failed_alone(store).code == "killed_its_worker"


def test_a_job_is_made_over_grafts_that_others_published(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "lora(r=2)", "ftjob-1": "ia3", "ftjob-2": "lora(r=3)"})
    asked: list[str] = []

    def between() -> None:
        if not asked and all(job.state is JobState.SUCCEEDED for job in _jobs(store)):
            asked.extend(["o-lora(r=2, old=2, of=ftjob-0@1)", "meteora(r=2, of=ftjob-0|ftjob-1)", "spot(of=ftjob-9)"])
            asked.append("lora(r=3) + from(of=ftjob-2@1)")
            (tmp_path / "grafts" / str(_jobs(store)[2].graft) / "graft.safetensors").unlink()
            for index, peft in enumerate(asked, start=3):
                submit_one(store, tmp_path, f"ftjob-{index}", peft, index)
            store.append(keys.commands(PACK), {"op": "close", "job": ""})

    _worker(store, backbone, tmp_path).run(between)
    first, _, _, over, unlike, missing, damaged = _jobs(store)
    assert over.state is JobState.SUCCEEDED
    wrong = ("'ftjob-1' is 'ia3', not a LoRA", "'ftjob-9' does not exist", "'ftjob-2@1' cannot be read")
    for failed, said in zip((unlike, missing, damaged), wrong, strict=True):
        assert failed.state is JobState.FAILED and failed.error is not None and said in failed.error.message
        assert (failed.error.code, failed.error.param) == ("invalid_value", PEFT)
    old, new = (
        native.load(tmp_path / "grafts" / str(job.graft), shape=backbone.shape, backbone=backbone.fingerprint)
        for job in (first, over)
    )
    assert torch.equal(new.tensors["0.1.attn.q.A0"], old.tensors["0.1.attn.q.A"])
    assert torch.equal(new.tensors["0.1.attn.q.B0"], 8.0 * old.tensors["0.1.attn.q.B"])  # alpha / r


def test_a_cancelled_job_leaves_the_pack_and_its_checkpoints_go(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3", "ftjob-1": "bitfit"})
    advance_job(store, JobCancelRequested(job=JobId("ftjob-1"), at=2.0))
    store.append(keys.commands(PACK), {"op": "cancel", "job": "ftjob-1"})
    _work(store, backbone, tmp_path)
    kept, gone = _jobs(store)
    assert kept.state is JobState.SUCCEEDED and gone.state is JobState.CANCELLED
    assert not (tmp_path / "jobs" / "ftjob-1").exists()


def test_a_newer_worker_of_the_pack_shuts_the_older_one_out(backbone: Backbone, tmp_path: Path) -> None:
    from polygraft.cluster.store.base import Fenced

    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    older = _worker(store, backbone, tmp_path)
    _worker(store, backbone, tmp_path)
    with pytest.raises(Fenced):
        older.run(lambda: None)


def test_a_saved_graft_is_the_job_s_weights(backbone: Backbone, tmp_path: Path) -> None:
    store = MemoryStore()
    submit(store, tmp_path, {"ftjob-0": "lora(r=4)"})
    _work(store, backbone, tmp_path)
    (job,) = _jobs(store)
    loaded = native.load(tmp_path / "grafts" / str(job.graft), shape=backbone.shape, backbone=backbone.fingerprint)
    assert loaded.id == job.graft and any(
        value.abs().sum() > 0 for name, value in loaded.tensors.items() if name.endswith("B")
    )


def _raise_for(method: str, error: Exception, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`error` in what is called at this place of trainers, for jobs of the method."""
    real = resolve_name(f"polygraft.trainers.{at}")

    def failing(graft: BoundGraft, *given: object, **more: object) -> object:
        if graft.spec.method == method:
            raise error
        return real(graft, *given, **more)

    monkeypatch.setattr(f"polygraft.trainers.{at}", failing)


def _messages(store: Store) -> list[str]:
    return [str(entry["message"]) for _, entry in store.read(keys.log(JobId("ftjob-0")))]


def _crash(*_args: object, **_options: object) -> None:
    raise Crash


def _worker(store: Store, backbone: Backbone, data: Path) -> PackWorker:
    tokeniser = Tokeniser.load(backbone.folder)
    return PackWorker(PACK, PackRunner(backbone, max_rows=512), tokeniser, store, folders=Folders(data), micro_rows=128)


def _work(store: Store, backbone: Backbone, data: Path) -> None:
    if not (data / "packs" / PACK / "manifest.json").exists():
        store.append(keys.commands(PACK), {"op": "close", "job": ""})
    _worker(store, backbone, data).run(lambda: None)


def _failed_alone(store: Store) -> JobError:
    """Why the second of two jobs failed; the first succeeded."""
    good, bad = _jobs(store)
    assert good.state is JobState.SUCCEEDED and bad.state is JobState.FAILED
    assert bad.error is not None
    return bad.error


def _jobs(store: Store) -> list[Job]:
    records = (store.get(keys.job(JobId(f"ftjob-{i}"))) for i in range(9))
    return [replace(record.value) for record in records if record is not None]

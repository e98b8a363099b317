"""Jobs as the ingress and the controller leave them for a pack's worker: records, files, and commands to admit them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from polygraft.cluster.advance import advance_job, advance_pack
from polygraft.cluster.events import JobAdmitted, JobSubmitted, PackOpening
from polygraft.cluster.model import DeviceId, FileId, Job, JobId, JobSpec, PackId, TenantId
from polygraft.cluster.rung import Rung
from polygraft.cluster.states import Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write

PACK = PackId("pack-1")


def submit(store: Store, data: Path, jobs: Mapping[str, str], *, seed: int = 0) -> None:
    """`jobs` maps a job's id to its graft's text; each trains a few pairs for a few epochs."""
    (data / "files").mkdir(parents=True)
    opening = PackOpening(
        pack=PACK, backbone="tiny", devices=(DeviceId("d"),), bytes=1, epoch=1, reason=Reason.JOBS_WAIT, at=0.0
    )
    advance_pack(store, opening)
    for index, (job, peft) in enumerate(jobs.items()):
        submit_one(store, data, job, peft, index, seed=seed)


def submit_one(store: Store, data: Path, job: str, peft: str, index: int, *, seed: int = 0) -> None:
    """One job more for the pack."""
    pairs = [("What is a graft?", "A shoot."), ("Who feeds it?", "The stock."), ("When?", "In late winter.")]
    lines = [
        {"messages": [{"role": "user", "content": f"{q} {index}"}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    file = FileId(f"file-{job}")
    _write(data, file, lines)
    spec = JobSpec(
        backbone="tiny",
        training_file=file,
        validation_file=file,
        peft=peft,
        epochs=4,
        batch_size=1 + index,
        learning_rate=0.01,
        seed=index + 100 * seed,
    )
    _admit(store, job, spec)


def submit_again(store: Store, job: str, like: str, rung: Rung, pack: PackId) -> None:
    """One job more for a pack, as another one is but for its rung."""
    found = store.get(keys.job(JobId(like)))
    assert found is not None
    _admit(store, job, replace(found.value.spec, rung=rung), pack)


def submit_text(store: Store, data: Path, job: str, peft: str, answers: Sequence[str], *, max_length: int) -> None:
    """One job more, which trains once on these answers and has no validation file."""
    file = FileId(f"file-{job}")
    asked = {"role": "user", "content": "What is a graft?"}
    _write(data, file, [{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers])
    spec = JobSpec(backbone="tiny", training_file=file, peft=peft, epochs=1, batch_size=1, max_length=max_length)
    _admit(store, job, spec)


def submit_labelled(
    store: Store,
    data: Path,
    peft: str,
    lines: Sequence[object],
    *,
    epochs: int,
    max_length: int | None = None,
) -> Job:
    """Job ftjob-1, which classifies; the same file is trained on, and judged on twice."""
    job = "ftjob-1"
    file = FileId(f"file-{job}")
    _write(data, file, lines)
    spec = JobSpec(
        backbone="tiny",
        kind="classification",
        training_file=file,
        validation_file=file,
        test_file=file,
        peft=peft,
        epochs=epochs,
        batch_size=2,
        learning_rate=0.01,
        max_length=max_length,
    )
    record = Job(id=JobId(job), tenant=TenantId("t"), spec=spec, created_at=0.0)
    if store.get(keys.pack(PACK)) is not None:
        _admit(store, job, spec)
    return record


def _write(data: Path, file: FileId, lines: Sequence[object]) -> None:
    (data / "files" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _admit(store: Store, job: str, spec: JobSpec, pack: PackId = PACK) -> None:
    record = Job(id=JobId(job), tenant=TenantId("t"), spec=spec, created_at=0.0)
    store.commit([Write(keys.job(record.id), record, 0)], [JobSubmitted(record=record, at=0.0)])
    advance_job(store, JobAdmitted(job=record.id, pack=pack, at=1.0))
    store.append(keys.commands(pack), {"op": "admit", "job": job})

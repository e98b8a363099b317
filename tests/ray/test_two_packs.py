"""Two real packs of one backbone under a real leader: they fill, half of their jobs end, and the rest of them is drawn
into one, with the bits of jobs that never moved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from polygraft.cluster.actors.effects import Means
from polygraft.cluster.actors.leader import start_leader
from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.events import JobMoving, JobSubmitted
from polygraft.cluster.model import START, FileId, Job, JobId, JobSpec, TenantId
from polygraft.cluster.settings import load
from polygraft.cluster.states import JobState, PackState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.launch.engines import DeployBackbone
from polygraft.launch.packs import OpenHost
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from tests.cluster.builders import make_backbone
from tests.ray.local import local_ray
from tests.tiny import tiny_llama

LONG, SHORT = 90, 30  # steps, of 0.3 s at least
JOBS = {
    "ftjob-0": ("lora(r=4)", LONG),
    "ftjob-1": ("ia3", SHORT),
    "ftjob-2": ("prefix(4)", LONG),
    "ftjob-3": ("dora(r=2)", SHORT),
}


@pytest.mark.nightly
def test_the_rest_of_two_packs_is_drawn_into_one_and_keeps_its_bits(tmp_path: Path) -> None:
    folder, data = tiny_llama(tmp_path / "tiny"), tmp_path / "data"
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        settings = load(
            home=tmp_path,
            data=data,
            store_url=server.url,
            dtype="fp32",
            step_floor_s=0.3,
            pack={"max_jobs": 2, "opening_s": 5.0, "idle_s": 5.0},
        )
        backbone = make_backbone("tiny", folder=str(folder), dtype="fp32", asked_at=0.0)
        put_backbone(store, backbone, at=time.time())
        with local_ray({}, devices=2):
            means = Means(OpenHost.of(settings), DeployBackbone.of(settings))  # nobody asks for answers
            leader = start_leader(server.url, settings.pack_limits, means, name="controller")
            for job, (peft, epochs) in JOBS.items():
                submit(store, data, JobId(job), peft, epochs)
            until(lambda: all(job.final for job in jobs(store)), 220)
            until(lambda: all(found.value.state is PackState.CLOSED for found in store.scan(keys.PACKS)), 60)
            ray.kill(leader)
        ended = jobs(store)
        moved = [one.event for one in store.events(START) if isinstance(one.event, JobMoving)]
        packs = store.scan(keys.PACKS)
        store.close()
    assert [job.state for job in ended] == [JobState.SUCCEEDED] * len(JOBS), [job.error for job in ended]
    assert len(packs) == 2 and moved and {event.reason for event in moved} == {Reason.JOINED}
    torch.set_num_threads(1)
    loaded = Backbone.load(folder, torch.float32)
    for one in ended:
        assert one.graft == alone(loaded, one, data)


def alone(backbone: Backbone, job: Job, data: Path) -> str:
    runner = PackRunner(backbone)
    backbone_files = BackboneFiles(backbone.folder)
    trained = prepare(
        job,
        files=data / "files",
        tokeniser=Tokeniser.load(backbone.folder),
        backbone_files=backbone_files,
        micro_rows=128,
    )
    running = runner.admit(trained)
    while not running.finished:
        runner.step()
    return native.graft_id(trained.graft.spec, running.slab.tensors, backbone.fingerprint)


def submit(store: Store, data: Path, job: JobId, peft: str, epochs: int) -> None:
    (data / "files").mkdir(parents=True, exist_ok=True)
    asked, answer = {"role": "user", "content": f"What is {job}?"}, {"role": "assistant", "content": "A shoot."}
    (data / "files" / f"file-{job}.jsonl").write_text(json.dumps({"messages": [asked, answer]}) + "\n")
    spec = JobSpec(backbone="tiny", training_file=FileId(f"file-{job}"), peft=peft, epochs=epochs, learning_rate=0.01)
    now = time.time()
    record = Job(id=job, tenant=TenantId("t"), spec=spec, created_at=now, parameters=1000, reason=Reason.TURN)
    store.commit([Write(keys.job(job), record, 0)], [JobSubmitted(record=record, at=now)])


def jobs(store: Store) -> list[Job]:
    records = (store.get(keys.job(JobId(job))) for job in JOBS)
    return [found.value for found in records if found is not None]


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)

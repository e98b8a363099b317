"""A pack's worker under Ray Train is killed for real between its last step and publication."""

from pathlib import Path

import pytest
import ray
import torch

from polygraft.cluster.model import JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import faults
from polygraft.trainers.host import PackPlan, start_host
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from tests.ray.local import local_ray
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit

METHODS = {"ftjob-0": "lora(r=4, at=attn.*)", "ftjob-1": "dora(r=2)", "ftjob-2": "prefix(4)"}


@pytest.mark.slow
def test_jobs_of_a_killed_worker_end_with_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    folder, marker = tiny_llama(tmp_path / "tiny"), tmp_path / "died"
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        submit(store, tmp_path / "data", METHODS)
        store.append(keys.commands(PACK), {"op": "close", "job": ""})
        plan = PackPlan(
            pack=PACK, backbone_folder=str(folder), store_url=server.url, data=str(tmp_path / "data"), dtype="fp32"
        )
        with local_ray({faults.VARIABLE: f"before_publish={marker}"}):
            ray.get(start_host(plan).run.remote(), timeout=150)
        assert marker.exists(), "the worker was never killed"
        jobs = [store.get(keys.job(JobId(job))) for job in METHODS]
        store.close()

    backbone = Backbone.load(folder, torch.float32)
    for found in jobs:
        assert found is not None and found.value.state is JobState.SUCCEEDED, found
        alone = PackRunner(backbone)
        tokeniser = Tokeniser.load(folder)
        files = tmp_path / "data" / "files"
        trained = prepare(
            found.value, files=files, tokeniser=tokeniser, stock=BackboneFiles(backbone.folder), micro_rows=128
        )
        running = alone.admit(trained)
        while not running.finished:
            alone.step()
        identity = native.graft_id(trained.graft.spec, running.slab.tensors, backbone.fingerprint)
        assert identity == found.value.graft

"""A pack's worker under Ray Train is killed for real between its last step and publication."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from polygraft.cluster.model import Holding, JobId, Occupancy
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import faults
from polygraft.trainers.host import start_host
from polygraft.trainers.plan import PackPlan
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from tests.cluster.builders import make_device
from tests.ray.local import local_ray
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit

MICRO_ROWS = 32
METHODS = {"ftjob-0": "lora(r=4, at=attn.*)", "ftjob-1": "dora(r=2)", "ftjob-2": "prefix(4)"}


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_jobs_of_a_killed_worker_end_with_the_weights_of_an_uninterrupted_run(devices: int, tmp_path: Path) -> None:
    folder, marker = tiny_llama(tmp_path / "tiny"), tmp_path / "died"
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        submit(store, tmp_path / "data", METHODS)
        store.append(keys.commands(PACK), {"op": "close", "job": ""})
        with local_ray({faults.VARIABLE: f"before_publish={marker}"}):
            node = str(ray.get_runtime_context().get_node_id())
            hold(store, node, devices)
            plan = PackPlan(
                pack=PACK,
                nodes=(node,) * devices,
                kind="cpu",
                cores=1,
                backbone_folder=str(folder),
                store_url=server.url,
                data=str(tmp_path / "data"),
                dtype="fp32",
                micro_rows=MICRO_ROWS,
            )
            ray.get(start_host(plan).run.remote(), timeout=250)
        assert marker.exists(), "the worker was never killed"
        jobs = [store.get(keys.job(JobId(job))) for job in METHODS]
        store.close()

    torch.set_num_threads(1)
    backbone = Backbone.load(folder, torch.float32)
    for found in jobs:
        assert found is not None and found.value.state is JobState.SUCCEEDED, found
        alone = PackRunner(backbone)
        tokeniser = Tokeniser.load(folder)
        files = tmp_path / "data" / "files"
        trained = prepare(
            found.value,
            files=files,
            tokeniser=tokeniser,
            backbone_files=BackboneFiles(backbone.folder),
            micro_rows=MICRO_ROWS,
        )
        running = alone.admit(trained)
        while not running.finished:
            alone.step()
        identity = native.graft_id(trained.graft.spec, running.slab.tensors, backbone.fingerprint)
        assert identity == found.value.graft


def hold(store: Store, node: str, devices: int) -> None:
    """The pack's record and the devices', as when the controller opened it over so many of the node."""
    found = store.get(keys.pack(PACK))
    assert found is not None
    held = [make_device(f"{node}/cpu{index}", node=node, index=index, cores=1) for index in range(devices)]
    writes = [Write(keys.device(one.id), Occupancy(device=one, holders=(Holding(PACK, 1),)), 0) for one in held]
    pack = replace(found.value, devices=tuple(one.id for one in held))
    store.commit([Write(found.key, pack, found.version), *writes])

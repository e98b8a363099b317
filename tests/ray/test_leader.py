"""The controller as an actor of a real Ray, over a real Valkey, with packs whose workers only pretend to train."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from polygraft.cluster.actors.controller import POLL_S
from polygraft.cluster.actors.effects import Means, PackHost
from polygraft.cluster.actors.leader import start_leader
from polygraft.cluster.actors.protocols import PackDied
from polygraft.cluster.actors.reservations import give_back
from polygraft.cluster.advance import advance_job, advance_pack
from polygraft.cluster.api_keys import verify_key
from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.events import ControllerStarted, JobStarted, JobSubmitted, PackOpened
from polygraft.cluster.model import START, Backbone, GraftId, Job, JobId, Limits, Pack, PackId
from polygraft.cluster.publish import publish
from polygraft.cluster.states import JobState, PackState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import OLDEST, Store, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.serve_app import build
from polygraft.trainers.host import start_host
from polygraft.trainers.plan import PackPlan
from tests.cluster.builders import make_backbone, make_job
from tests.k8s.pod import SERVICE_LINKS, Pod
from tests.ray.local import local_ray
from tests.tiny import tiny_llama

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests


class Pretender:
    """A pack whose jobs succeed as soon as they start; `endless` runs on, `deadly` kills the pack."""

    def __init__(self, url: str, pack: PackId) -> None:
        self._store = connect(url)
        self._pack = pack

    def ping(self) -> PackId:
        return self._pack

    def run(self) -> None:
        store, pack = self._store, self._pack
        lease = store.acquire(keys.pack_scope(pack), "pretender", 60.0, steal=True)
        assert lease is not None
        advance_pack(store, PackOpened(pack=pack, at=time.time()), fence=lease.fence)
        position = OLDEST
        while True:
            for at, entry in store.read(keys.commands(pack), position, wait_s=0.5):
                position = at
                if entry["op"] == "close":
                    return
                job = JobId(str(entry["job"]))
                started = JobStarted(job=job, pack=pack, parameters=1, steps_total=1, at=time.time())
                advance_job(store, started, fence=lease.fence)
                if job == "ftjob-deadly":
                    raise PackDied("no memory for ftjob-deadly", [job])
                if job != "ftjob-endless":
                    publish(
                        store,
                        job,
                        graft=GraftId("g"),
                        method="lora",
                        backbone_fingerprint="f",
                        parameters=1,
                        bytes=4,
                        context_length=0,
                        at=time.time(),
                        fence=lease.fence,
                    )


class Maker:
    def reserve(self) -> str:
        """The id of a group that has half of the device."""
        group = placement_group([{"device": 0.5}])
        ray.get(group.ready())
        return str(group.id.hex())


def maker(**resources: float) -> ActorHandle[Any]:
    return cast("ActorHandle[Any]", ray.remote(Maker).options(num_cpus=0, resources=resources).remote())


def given_back(group: PlacementGroup) -> bool:
    give_back()
    return bool(placement_group_table(group)["state"] == "REMOVED")


def opener(url: str) -> Callable[[Pack], ActorHandle[PackHost]]:
    return lambda pack: ray.remote(Pretender).options(num_cpus=0, resources={"device": 0.5}).remote(url, pack.id)  # type: ignore[return-value]


def nobody(backbone: Backbone) -> None:
    raise AssertionError(f"{backbone.name} was deployed, and there is no Serve")


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with local_ray({}):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "store") as server:
        yield server


def test_packs_open_fail_are_lost_and_close_under_a_leader(server: EmbeddedServer) -> None:
    store = connect(server.url)
    limits = Limits(idle_s=1.0, max_attempts=1)
    put_backbone(store, make_backbone("b"), at=time.time())
    leader = start_leader(server.url, limits, Means(opener(server.url), nobody), name="controller")

    submit(store, "quick")
    until(lambda: job_of(store, "quick").state is JobState.SUCCEEDED)
    assert job_of(store, "quick").model == "ftjob-quick@1"

    submit(store, "deadly")
    until(lambda: job_of(store, "deadly").state is JobState.FAILED)
    error = job_of(store, "deadly").error
    assert error is not None and error.code == "its_packs_failed"
    failed = [pack for pack in packs(store) if pack.state is PackState.FAILED]
    assert [pack.error for pack in failed] == ["no memory for ftjob-deadly"]

    submit(store, "endless")
    until(lambda: job_of(store, "endless").state is JobState.RUNNING)
    first = job_of(store, "endless").pack
    ray.kill(leader, no_restart=False)  # takes its packs with it; Ray starts it again
    until(lambda: job_of(store, "endless").state is JobState.RUNNING and job_of(store, "endless").pack != first)
    assert job_of(store, "endless").attempts == 0
    ray.get(leader.check.remote())

    server.stop()
    time.sleep(1.0)
    server.start()
    submit(store, "last")
    until(lambda: job_of(store, "last").state is JobState.SUCCEEDED)
    ray.get(leader.check.remote())
    ray.get(leader.stop.remote())
    assert store.acquire(keys.CONTROLLER, "test", 1.0) is not None
    ray.kill(leader)


def test_what_a_dead_pack_has_reserved_is_given_back_and_what_others_have_is_not() -> None:
    makers = [maker(), maker()]
    made: list[str] = ray.get([one.reserve.remote() for one in makers])
    groups = [PlacementGroup(ray.PlacementGroupID(bytes.fromhex(one))) for one in made]
    ray.kill(makers[0])
    until(lambda: given_back(groups[0]))
    assert placement_group_table(groups[1])["state"] == "CREATED"
    until(lambda: ray.available_resources().get("device") == 0.5)
    remove_placement_group(groups[1])
    ray.kill(makers[1])


def test_the_image_s_entry_point_runs_under_the_manifest_s_environment(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Serve calls on a cluster, in the environment of its pods, and beside a Service that is called polygraft."""
    pod = Pod(tmp_path, server.url)
    for name, value in (pod.environment | SERVICE_LINKS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POLYGRAFT_BACKBONE", str(tiny_llama(tmp_path / "tiny")))
    store = connect(server.url)
    other = store.acquire(keys.CONTROLLER, "the controller of a cluster that is being replaced", 600.0)
    assert other is not None
    build({})
    found = verify_key(store, pod.key)
    assert found is not None and found.tenant == "local"
    time.sleep(2 * POLL_S)
    assert store.renew(other) and not terms(store), "the new cluster's controller waits for the old one's to end"
    store.release(other)
    until(lambda: len(terms(store)) == 1)

    build({})  # the same settings: the controller that is there goes on
    pod.write_key(second := f"pg-{'b' * 32}")
    monkeypatch.setenv("POLYGRAFT_PACK__MAX_JOBS", "3")
    build({})  # others: it is replaced
    until(lambda: len(terms(store)) == 2)
    assert verify_key(store, pod.key) is None and verify_key(store, second) is not None
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = {one["name"] for one in actors if one["namespace"] == "polygraft"}
    (leader,) = names - {"searches"}
    assert names == {leader, "searches"}, "one keeper of searches beside the controller"
    ray.get(ray.get_actor(leader, namespace="polygraft").stop.remote())
    for name in names:
        ray.kill(ray.get_actor(name, namespace="polygraft"))


def test_a_pack_for_which_ray_has_no_room_says_what_is_lacking_and_where(tmp_path: Path) -> None:
    node = ray.get_runtime_context().get_node_id()
    other = maker(device=0.75)
    ray.get(other.__ray_ready__.remote(), timeout=30.0)
    plan = PackPlan(
        pack="pack-1",
        nodes=(node,),
        kind="cpu",
        cores=1,
        backbone_folder="",
        store_url="memory://",
        data=str(tmp_path),
        placed_s=1.0,
    )
    with pytest.raises(RayTaskError) as failed:
        ray.get(start_host(plan).run.remote(), timeout=120.0)
    assert isinstance(failed.value.cause, PackDied) and not failed.value.cause.suspects
    assert f"node {node} has 0.25 of 1 device free, and 0.5 is asked for" in str(failed.value.cause)
    ray.kill(other)


def terms(store: Store) -> list[int]:
    """The epochs of those who led."""
    return [one.event.epoch for one in store.events(START) if isinstance(one.event, ControllerStarted)]


def submit(store: Store, name: str) -> None:
    job = make_job(name, created_at=time.time())
    store.commit([Write(keys.job(job.id), job, 0)], [JobSubmitted(record=job, at=job.created_at)])


def job_of(store: Store, name: str) -> Job:
    found = store.get(keys.job(JobId(f"ftjob-{name}")))
    assert found is not None
    return found.value


def packs(store: Store) -> list[Pack]:
    return [found.value for found in store.scan(keys.PACKS)]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)

"""Whatever is killed, stopped or drained under a service over several nodes, or where it gets other settings, streams
and jobs come to what they come to undisturbed, and nothing is published twice.

Every engine and pack step takes a floor of time, ten times what it computes, so that there are streams and jobs to be
hurt, and four devices' worth of them on two cores.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import psutil
import pytest
import ray

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import ApiFailure
from polygraft.cluster.model import JobId
from polygraft.cluster.store import keys
from polygraft.launch.draining import empty, tell
from tests.nodes.faults import FAULTS, WORKER, Hit, end_of, hit_together, pairs
from tests.nodes.fleet import Asked, Fleet, Said, ingresses_running, nodes, until
from tests.nodes.load import Load, together
from tests.tiny import tiny_llama, tiny_model

pytestmark = [pytest.mark.timeout(600)]
FLOOR_S = 0.3
TOKENS = 20
LONG = 57  # tokens of a stream that is still running when its end must have been noticed
STREAMS = 4
EPOCHS = 10
OTHER = "other"
INGRESS = "ServeReplica:polygraft:ingress"
REPLICA = "ServeReplica:backbone-"
KEEPERS = ("Leader", "SearchKeeper")
FOR_EVER = Counter([*KEEPERS, "_AutoscalingCoordinatorActor", "ServeController"])
SILENT_S = 5.0
SERVE = {
    "max_context": 400,
    "kv_bytes": 8 << 20,
    "max_streams": 4,
    "max_replicas": 2,
    "calm_s": 3.0,
    "drain_s": 15.0,
    "silent_s": SILENT_S,
}
SETTINGS: dict[str, object] = {
    "step_floor_s": FLOOR_S,
    "pack": {"max_jobs": 2, "idle_s": 30.0, "silent_s": 8.0},
    "serve": SERVE,
}


class Undisturbed(NamedTuple):
    """What the streams say, and the graft that a job on each backbone gives, when nothing happens."""

    texts: Mapping[Asked, str]
    grafts: Mapping[str, str | None]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three nodes, four devices, two ingresses, two backbones."""
    home = tmp_path_factory.mktemp("nodes")
    own, other = tiny_llama(home / "own"), tiny_model(home / "other", "qwen3", seed=3)
    with nodes(home, own, devices=(2, 2), settings=SETTINGS) as fleet:
        fleet.client.add_backbone(OTHER, str(other), dtype="fp32", quantise=None)
        yield fleet


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> Undisturbed:
    """And what share of the machine's processors it takes."""
    asked = asked_of(fleet)
    texts = together(fleet.say, asked)
    jobs = started(fleet)
    assert len(fleet.client.cluster().packs) == 3
    began, before = time.monotonic(), spent_s()
    with Load(fleet.say, texts):
        grafts = {job.model: fleet.client.wait(job.id).graft for job in jobs}
    share = (spent_s() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
    print(f"undisturbed: {share:.0%} of the processors' time")
    assert all(grafts.values()) and all(texts.values())
    return Undisturbed(texts, grafts)


def asked_of(fleet: Fleet) -> list[Asked]:
    """Half of them sampled, half on each backbone."""
    return [
        Asked(OTHER if n % 2 else str(fleet.home / "own"), f"Say {n}", TOKENS, n if n >= STREAMS // 2 else None)
        for n in range(STREAMS)
    ]


def spent_s() -> float:
    """Processor time of all that this machine has run, by all processors: what has ended counts, too."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def started(fleet: Fleet, *, ranks: int = 1) -> list[RemoteJob]:
    """Jobs: enough for two packs of the second backbone, or for one over as many devices as `ranks`, and one on the
    first. Both backbones train."""
    jobs = fleet.submit(OTHER, 3 if ranks == 1 else 1, epochs=EPOCHS, devices=ranks)
    jobs += fleet.submit(str(fleet.home / "own"), 1, epochs=EPOCHS)
    until(lambda: all(fleet.client.job(job.id).status in ("running", "succeeded") for job in (jobs[0], jobs[-1])))
    return jobs


def ended_as_undisturbed(fleet: Fleet, jobs: list[RemoteJob], undisturbed: Undisturbed) -> None:
    done = [fleet.client.wait(job.id) for job in jobs]
    assert [job.status for job in done] == ["succeeded"] * len(jobs), [job.error for job in done]
    assert [job.graft for job in done] == [undisturbed.grafts[job.model] for job in jobs]
    assert fleet.published(jobs) == Counter([job.id for job in jobs])


def no_step_is_taken_twice(fleet: Fleet, jobs: list[RemoteJob]) -> None:
    for job in jobs:
        steps = [entry["step"] for _, entry in fleet.store.read(keys.metrics(JobId(job.id)))]
        assert steps == list(range(1, len(steps) + 1))


ROUNDS = [pytest.param(number, marks=[pytest.mark.nightly] if number else []) for number in range(10)]
PAIRS = [
    pytest.param(names, number, id=f"{' and '.join(names)}-{number}", marks=[pytest.mark.nightly] if number else [])
    for number in range(10)
    for names in pairs(number)
]


@pytest.mark.parametrize(("names", "round_"), PAIRS)
def test_two_faults_at_once_change_neither_a_word_nor_a_weight_and_publish_nothing_twice(
    fleet: Fleet, undisturbed: Undisturbed, names: tuple[str, str], round_: int
) -> None:
    survived(fleet, undisturbed, names, after_s=TOKENS * FLOOR_S * (3 + round_) / 15)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_neither_a_word_nor_a_weight_and_publishes_nothing_twice(
    fleet: Fleet, undisturbed: Undisturbed, name: str
) -> None:
    survived(fleet, undisturbed, [name], after_s=TOKENS * FLOOR_S / 5)


def survived(fleet: Fleet, undisturbed: Undisturbed, names: Sequence[str], *, after_s: float) -> None:
    """What the faults of these names do in the midst of streams and jobs is undone."""
    faults = [FAULTS[name] for name in names]
    jobs = started(fleet, ranks=max(fault.ranks for fault in faults))
    with Load(fleet.say, undisturbed.texts) as load:
        time.sleep(after_s)
        began = time.monotonic()
        hits = hit_together(faults, fleet)
        for fault in faults:
            fault.mend(fleet)
        ended_as_undisturbed(fleet, jobs, undisturbed)
        jobs_s = time.monotonic() - began
        for hit in hits:
            end_of(hit, fleet)
        ended_s = time.monotonic() - began
    assert fleet.published(jobs) == Counter([job.id for job in jobs])
    print(
        f"{' and '.join(names)}: a client waited {load.gap_s:.1f} s at most, "
        f"{jobs_s:.0f} s to the jobs' end, {ended_s:.0f} s to {'their' if hits[1:] else 'its'}"
    )


@pytest.mark.nightly
@pytest.mark.parametrize("round_", ROUNDS)
def test_a_worker_that_is_stopped_before_it_begins_is_replaced(
    fleet: Fleet, undisturbed: Undisturbed, round_: int
) -> None:
    until(lambda: not fleet.client.cluster().packs)  # so that one opens
    jobs = fleet.submit(OTHER, 1, epochs=EPOCHS)
    until(lambda: bool(fleet.processes(WORKER)), 60.0)
    time.sleep(round_ / 5)
    hit = Hit(fleet.processes(WORKER))
    began = time.monotonic()
    for process in hit.processes:
        process.suspend()
    ended_as_undisturbed(fleet, jobs, undisturbed)
    end_of(hit, fleet)
    print(f"stop what begins: {time.monotonic() - began:.0f} s to the job's end")


@pytest.mark.nightly
def test_a_replica_that_is_stopped_before_it_begins_is_replaced(fleet: Fleet, undisturbed: Undisturbed) -> None:
    before = fleet.processes(REPLICA)
    before[0].kill()
    until(lambda: not set(fleet.processes(REPLICA)) <= set(before), 60.0)
    hit = Hit([one for one in fleet.processes(REPLICA) if one not in before])
    for process in hit.processes:
        process.suspend()
    ended_s = end_of(hit, fleet)
    assert together(fleet.say, list(undisturbed.texts)) == undisturbed.texts
    print(f"stop a replica that begins: {ended_s:.0f} s to its end")


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_node_is_drained_under_load_and_nobody_notices(fleet: Fleet, undisturbed: Undisturbed, round_: int) -> None:
    """Its packs put their jobs down first: no step is taken twice. Ray lets it go since what is for ever is on the
    head, and is started there again."""
    for process in (one for kind in KEEPERS for one in fleet.processes(kind)):
        process.kill()
    jobs = started(fleet)
    until(lambda: fleet.actors(ray.get_runtime_context().get_node_id()) >= FOR_EVER)
    with Load(fleet.say, undisturbed.texts) as load:
        time.sleep(round_ * FLOOR_S)
        trains = {device.partition("/")[0] for pack in fleet.client.cluster().packs for device in pack.devices}
        node = next(one for one in fleet.cluster.worker_nodes if one.node_id in trains)
        began = time.monotonic()
        assert tell(fleet.cluster.address, node.node_id, 90.0) == node.node_id
        assert empty(fleet.store, node.node_id, 90.0)
        empty_s = time.monotonic() - began
        ended_as_undisturbed(fleet, jobs, undisturbed)
        until(lambda: not fleet.alive(node), lacking=lambda: fleet.left_on(node))
    fleet.cluster.remove_node(node, allow_graceful=False)
    fleet.add_node(2)
    no_step_is_taken_twice(fleet, jobs)
    print(f"drain node: a client waited {load.gap_s:.1f} s at most, the node was empty after {empty_s:.0f} s")


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_service_with_other_settings_takes_over_and_nobody_notices(
    fleet: Fleet, undisturbed: Undisturbed, round_: int
) -> None:
    jobs = started(fleet)
    leader = fleet.processes("Leader")
    with Load(fleet.say, undisturbed.texts) as load:
        began = time.monotonic()
        fleet.apply(serve={**SERVE, "calm_s": 3.5 + round_})
        ended_as_undisturbed(fleet, jobs, undisturbed)
        until(lambda: not any(one.is_running() for one in leader))
    no_step_is_taken_twice(fleet, jobs)
    print(f"update: a client waited {load.gap_s:.1f} s at most, jobs had ended after {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("round_", ROUNDS)
def test_the_streams_of_a_dead_ingress_end_with_an_error_and_their_replicas_stop_computing_them(
    fleet: Fleet, undisturbed: Undisturbed, round_: int
) -> None:
    asked = [one._replace(tokens=LONG) for one in undisturbed.texts]
    texts = together(fleet.say, asked)
    until(lambda: ingresses_running() == 2)
    ingresses = fleet.processes(INGRESS)
    assert len(ingresses) == 2
    broken: list[Said] = []

    def say(one: Asked) -> None:
        said, text = fleet.say(one), texts[one]
        assert said.text == text or (said.broken and text.startswith(said.text))
        broken.extend([said] if said.broken else [])

    with ThreadPoolExecutor(2 * len(asked)) as pool:
        streams: list[Future[None]] = []
        for wave in (asked, asked):  # what comes at once Serve may well send to one ingress
            streams.extend(pool.submit(say, one) for one in wave)
            until(lambda: fleet.computing() == len(streams))
        time.sleep(round_ * FLOOR_S)
        ingresses[round_ % 2].kill()
        began = time.monotonic()
        until(
            lambda: bool(broken) and fleet.computing() == len(streams) - len(broken),
            2 * SILENT_S,
            lacking=lambda: (
                broken,
                [one.exception() for one in streams if one.done()],
                fleet.client.cluster().replicas,
            ),
        )
        noticed_s = time.monotonic() - began
        assert sum(not one.done() for one in streams) == len(streams) - len(broken), "others go on"
        for stream in streams:
            stream.result()
    until(lambda: len(fleet.processes(INGRESS)) == ingresses_running() == 2)
    print(f"kill ingress: {len(broken)} of {len(streams)} streams ended with an error, {noticed_s:.1f} s to their end")


def test_a_backbone_that_answers_is_not_removed_whichever_ingress_is_asked(
    fleet: Fleet, undisturbed: Undisturbed
) -> None:
    with Load(fleet.say, {one: text for one, text in undisturbed.texts.items() if one.model == OTHER}):
        until(lambda: fleet.computing() > 0)
        time.sleep(1.0)  # until it has been said
        for _ in range(8):
            with pytest.raises(ApiFailure) as refused:
                fleet.client.remove_backbone(OTHER)
            assert refused.value.status == 409 and "generating" in str(refused.value)

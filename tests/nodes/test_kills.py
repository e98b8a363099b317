"""Whatever is killed under a service over several nodes, streams and jobs come to what they come to undisturbed.

Every engine and pack step takes a floor of time, so that there are streams and jobs to be hurt.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.nodes.fleet import Fleet, Said, nodes, until
from tests.tiny import tiny_llama, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FLOOR_S = 0.05
TOKENS = 120
STREAMS = 4
EPOCHS = 20
OTHER = "other"
SETTINGS: dict[str, object] = {
    "step_floor_s": FLOOR_S,
    "pack": {"max_jobs": 2, "idle_s": 5.0},
    "serve": {"max_context": 400, "kv_bytes": 8 << 20, "max_streams": 4, "max_replicas": 2, "calm_s": 3.0},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three nodes, four devices, two ingresses, two backbones."""
    home = tmp_path_factory.mktemp("nodes")
    own, other = tiny_llama(home / "own"), tiny_model(home / "other", "qwen3", seed=3)
    with nodes(home, own, devices=(2, 2), settings=SETTINGS) as fleet:
        fleet.client.add_backbone(OTHER, str(other), dtype="fp32", quantise=None)
        yield fleet


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> tuple[list[str], str]:
    """What the streams say, and the graft that the jobs give, when nothing happens."""
    with ThreadPoolExecutor(STREAMS) as pool:
        texts = [stream.result().text for stream in _streams(fleet, pool)]
    assert all(texts)
    (job,) = fleet.submit(OTHER, 1, epochs=EPOCHS)
    graft = fleet.client.wait(job.id).graft
    assert graft is not None
    return texts, graft


def _streams(fleet: Fleet, pool: ThreadPoolExecutor) -> list[Future[Said]]:
    """Half of them sampled, half on each backbone."""

    def say(number: int) -> Said:
        model = OTHER if number % 2 else str(fleet.home / "own")
        return fleet.say(model, f"Say {number}", TOKENS, seed=number if number >= STREAMS // 2 else None)

    return [pool.submit(say, number) for number in range(STREAMS)]


def _kill_valkey(fleet: Fleet) -> None:
    """And start it again, as whoever supervises it does."""
    os.kill(fleet.server.pid, signal.SIGKILL)
    until(lambda: not fleet.server.alive)
    fleet.server.start()


def _kill_node(fleet: Fleet) -> None:
    """And put another in its place."""
    node = sorted(fleet.cluster.worker_nodes, key=lambda one: one.unique_id)[0]
    fleet.cluster.remove_node(node, allow_graceful=False)
    fleet.add_node(2)


FAULTS: dict[str, Callable[[Fleet], object]] = {
    "replica": lambda fleet: fleet.kill("Host"),
    "pack's worker": lambda fleet: fleet.kill("RayTrainWorker"),
    "controller": lambda fleet: fleet.kill("Leader"),
    "Serve's controller": lambda fleet: fleet.kill("ServeController"),
    "store": _kill_valkey,
    "node": _kill_node,
}


ROUNDS = [pytest.param(number, marks=[pytest.mark.nightly] if number else []) for number in range(10)]


@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kill_changes_neither_a_word_nor_a_weight(
    fleet: Fleet, undisturbed: tuple[list[str], str], fault: str, round_: int
) -> None:
    texts, graft = undisturbed
    jobs = fleet.submit(OTHER, 3, epochs=EPOCHS)
    until(lambda: any(fleet.client.job(job.id).status == "running" for job in jobs))
    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = _streams(fleet, pool)
        time.sleep(TOKENS * FLOOR_S * (3 + round_) / 15)  # in their midst
        assert not any(stream.done() for stream in streams)
        FAULTS[fault](fleet)
        said = [stream.result() for stream in streams]
    assert [one.text for one in said] == texts
    done = [fleet.client.wait(job.id) for job in jobs]
    assert [job.status for job in done] == ["succeeded"] * len(jobs)
    assert {job.graft for job in done} == {graft}
    gap_s, all_s = max(one.gap_s for one in said), time.monotonic() - began
    print(f"{fault}: a client waited {gap_s:.1f} s at most, all jobs were done after {all_s:.0f} s")

"""A node whose network is cut: what it holds goes on elsewhere, and when it is back it does nothing of it again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import psutil
import pytest
import ray

from tests.nodes.fleet import NODE_BYTES, Fleet, nodes, until
from tests.nodes.load import Load, together
from tests.nodes.test_kills import FLOOR_S, OTHER, ROUNDS, SETTINGS, TOKENS, asked_of, started
from tests.nodes.wire import HEAD, NODE, Wire, wire
from tests.tiny import tiny_llama, tiny_model

pytestmark = [pytest.mark.timeout(600)]
ENDED_S = 150.0  # Ray's own patience on the node that is cut off is a minute


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_node_that_is_cut_off_loses_its_streams_and_jobs_to_others_and_publishes_nothing_when_it_is_back(
    tmp_path: Path, round_: int
) -> None:
    own, other = tiny_llama(tmp_path / "own"), tiny_model(tmp_path / "other", "qwen3", seed=3)
    with wire() as cable, nodes(tmp_path, own, devices=(), settings=SETTINGS, host=HEAD) as fleet:
        fleet.client.add_backbone(OTHER, str(other), dtype="fp32", quantise=None)
        with behind(cable, fleet) as far:
            asked = asked_of(fleet)
            texts = together(fleet.say, asked)
            grafts = {job.model: fleet.client.wait(job.id).graft for job in started(fleet)}
            jobs = started(fleet)
            fleet.add_node(2)  # where all of it is to go
            with Load(fleet.say, texts) as load:
                time.sleep(TOKENS * FLOOR_S * (3 + round_) / 15)
                began = time.monotonic()
                cable.cut()
                until(lambda: not reached())
                noticed_s = time.monotonic() - began
                done = [fleet.client.wait(job.id) for job in jobs]
                jobs_s = time.monotonic() - began
                cable.mend()
                until(lambda: far.poll() is not None, ENDED_S)
        assert [job.graft for job in done] == [grafts[job.model] for job in jobs] and all(grafts.values())
        assert fleet.published(jobs) == Counter([job.id for job in jobs])
        print(
            f"cut network: a client waited {load.gap_s:.1f} s at most, Ray noticed after {noticed_s:.0f} s, "
            f"jobs had ended after {jobs_s:.0f} s"
        )


@contextmanager
def behind(cable: Wire, fleet: Fleet) -> Iterator[Popen[bytes]]:
    """A node of two devices behind the wire; nothing of it stays."""
    process = cable.start_ray(fleet.cluster.address, devices=2, memory=NODE_BYTES)
    started_by = psutil.Process(process.pid)
    try:
        until(reached)
        yield process
    finally:
        left = [started_by, *started_by.children(recursive=True)] if started_by.is_running() else []
        for one in left:
            one.kill()
        try:
            process.wait(10.0)
        except TimeoutExpired:
            process.kill()


def reached() -> bool:
    """Whether Ray has the node behind the wire for alive."""
    return any(one["NodeManagerAddress"] == NODE and one["Alive"] for one in ray.nodes())

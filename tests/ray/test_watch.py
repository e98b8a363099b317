"""Ray's actors that are stopped, whenever that is, are ended by whoever watches them."""

from __future__ import annotations

import time

import psutil
import pytest
import ray

from polygraft.cluster.actors.pings import told_of
from polygraft.cluster.actors.watch import Watch, Watched
from tests.ray.local import local_ray

SPACE = "watched"
REFUSED_S = 30.0  # longer than Ray tries to reach what it has never called: 22 s


class Answering:
    def __init__(self, seconds: float) -> None:
        time.sleep(seconds)

    async def check(self) -> None:
        pass


def process_of(name: str, state: str) -> psutil.Process:
    actor = ray.get_actor(name, namespace=SPACE)._actor_id.hex()
    while told_of(actor).get("State") != state or not told_of(actor).get("Pid"):
        time.sleep(0.1)
    return psutil.Process(int(str(told_of(actor)["Pid"])))


@pytest.mark.nightly
def test_one_that_stops_before_it_is_called_or_while_it_starts_is_ended_and_one_without_a_process_is_not() -> None:
    with local_ray({}):
        names = ("uncalled", "starting", "well", "waiting")
        for name, seconds in zip(names, (0.0, 600.0, 0.0, 0.0), strict=True):
            lacking = {"device": 5.0} if name == "waiting" else {}
            options = ray.remote(Answering).options(
                name=name, namespace=SPACE, lifetime="detached", num_cpus=0, resources=lacking
            )
            options.remote(seconds)
        stopped = [process_of("uncalled", "ALIVE"), process_of("starting", "PENDING_CREATION")]
        well = process_of("well", "ALIVE")
        for process in stopped:
            process.suspend()
        watch = Watch(lambda: [Watched(name, SPACE) for name in names], silent_s=REFUSED_S, starting_s=REFUSED_S)
        ends = time.monotonic() + 120.0
        while any(process.is_running() for process in stopped):
            assert time.monotonic() < ends
            watch.look()
            time.sleep(1.0)
        assert well.is_running()
        assert {one["name"] for one in ray.util.list_named_actors(all_namespaces=True)} == {"well", "waiting"}

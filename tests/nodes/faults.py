"""What may happen to a service over several nodes: whom it hits, by which signal, and who mends it from outside."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
from ray._private.node import Node

from tests.nodes.fleet import Fleet, until

WORKER = "RayTrainWorker"
STOPPED_S = 180.0  # after which one that is stopped must have been noticed, and ended


@dataclass
class Hit:
    """What a fault was done to."""

    processes: Sequence[psutil.Process]
    node: Node | None = None

    @property
    def gone(self) -> bool:
        return not any(_lives(process) for process in self.processes)

    def go_on(self) -> None:
        """Those that are stopped, and that nobody has ended, do what they were about to do."""
        for process in self.processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Fault:
    """`whom` finds the victims; `mend` is what whoever looks after processes or machines does then."""

    sign: signal.Signals
    whom: Callable[[Fleet], Hit]
    mend: Callable[[Fleet], object] = lambda _: None
    ranks: int = 1  # of the jobs that are underway

    def hit(self, fleet: Fleet) -> Hit:
        hit = self.whom(fleet)
        for process in hit.processes:
            with suppress(psutil.Error):
                process.send_signal(self.sign)
        return hit


def _actor(kind: str) -> Callable[[Fleet], Hit]:
    return lambda fleet: Hit(fleet.processes(kind)[:1])


def _rank(fleet: Fleet) -> Hit:
    """One of the two workers of the pack that was opened last; that which was opened first has but one."""
    return Hit(fleet.processes(WORKER)[-1:])


def _store(fleet: Fleet) -> Hit:
    return Hit([psutil.Process(fleet.server.pid)])


def _node(fleet: Fleet) -> Hit:
    node = sorted(fleet.cluster.worker_nodes, key=lambda one: one.unique_id)[0]
    return Hit(fleet.of_node(node), node)


def _start_store(fleet: Fleet) -> None:
    """As launch/supervisor.py does with one that is dead, or does not answer."""
    until(lambda: not fleet.server.alive, STOPPED_S)
    fleet.server.stop()
    fleet.server.start()


def _add_node(fleet: Fleet) -> None:
    fleet.add_node(2)


_PARTS: dict[str, Fault] = {
    "replica": Fault(signal.SIGKILL, _actor("Host")),
    "pack's worker": Fault(signal.SIGKILL, _actor(WORKER)),
    "one rank of two": Fault(signal.SIGKILL, _rank, ranks=2),
    "controller": Fault(signal.SIGKILL, _actor("Leader")),
    "Serve's controller": Fault(signal.SIGKILL, _actor("ServeController")),
    "store": Fault(signal.SIGKILL, _store, _start_store),
    "node": Fault(signal.SIGKILL, _node, _add_node),
}
KILLS = {f"kill {name}": fault for name, fault in _PARTS.items()}
STOPS = {f"stop {name}": Fault(signal.SIGSTOP, fault.whom, fault.mend, fault.ranks) for name, fault in _PARTS.items()}


def end_of(hit: Hit, fleet: Fleet) -> float:
    """Return when nothing of what was hit is left, and the seconds that this took. Where nobody can reach it, as on a
    node that is cut off, it goes on, and ends by itself."""
    began = time.monotonic()
    if hit.node is not None:
        until(lambda: hit.node is not None and not fleet.alive(hit.node), STOPPED_S)
        hit.go_on()
    until(lambda: hit.gone, STOPPED_S)
    if hit.node is not None:
        fleet.cluster.remove_node(hit.node, allow_graceful=False)
    return time.monotonic() - began


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

"""What may happen to a service over several nodes: whom it hits, by which signal, and who mends it from outside."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

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
        return not self.left()

    def left(self) -> Sequence[psutil.Process]:
        """Those that live. To its workers a dead raylet is there until this process, which started it, asks."""
        for info in [one for infos in self.node.all_processes.values() for one in infos] if self.node else ():
            info.process.poll()
        return [process for process in self.processes if _lives(process)]

    def go_on(self) -> None:
        """Those that are stopped, and that nobody has ended, do what they were about to do."""
        for process in self.processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Fault:
    """`whom` finds who may be the victim; `mend` is what whoever looks after processes or machines does then."""

    sign: signal.Signals
    whom: Callable[[Fleet], Iterable[Hit]]
    mend: Callable[[Fleet], object] = lambda _: None
    ranks: int = 1  # of the jobs that are underway


def hit_together(faults: Sequence[Fault], fleet: Fleet) -> list[Hit]:
    """What each of them was done to, no process by two of them."""
    hits: list[tuple[Fault, Hit]] = []
    for fault in sorted(faults, key=lambda one: one.whom is _nodes):  # of two nodes one has none of the others' victims
        taken = {process for _, hit in hits for process in hit.processes}
        hits.append((fault, next(one for one in fault.whom(fleet) if taken.isdisjoint(one.processes))))
    for fault, hit in hits:
        for process in hit.processes:
            with suppress(psutil.Error):
                process.send_signal(fault.sign)
    return [hit for _, hit in hits]


def _actors(kind: str) -> Callable[[Fleet], Iterable[Hit]]:
    """The oldest first."""
    return lambda fleet: [Hit([one]) for one in fleet.processes(kind)]


def _ranks(fleet: Fleet) -> Iterable[Hit]:
    """The workers of the pack that was opened last first: it has two, that which was opened first has but one."""
    return [Hit([one]) for one in reversed(fleet.processes(WORKER))]


def _store(fleet: Fleet) -> Iterable[Hit]:
    return [Hit([psutil.Process(fleet.server.pid)])]


def _nodes(fleet: Fleet) -> Iterable[Hit]:
    return [Hit(fleet.of_node(one), one) for one in sorted(fleet.cluster.worker_nodes, key=lambda one: one.unique_id)]


def _start_store(fleet: Fleet) -> None:
    """As launch/supervisor.py does with one that is dead, or does not answer."""
    until(lambda: not fleet.server.alive, STOPPED_S)
    fleet.server.stop()
    fleet.server.start()


def _add_node(fleet: Fleet) -> None:
    fleet.add_node(2)


_PARTS: dict[str, Fault] = {
    "replica": Fault(signal.SIGKILL, _actors("Host")),
    "pack's worker": Fault(signal.SIGKILL, _actors(WORKER)),
    "one rank of two": Fault(signal.SIGKILL, _ranks, ranks=2),
    "controller": Fault(signal.SIGKILL, _actors("Leader")),
    "Serve's controller": Fault(signal.SIGKILL, _actors("ServeController")),
    "store": Fault(signal.SIGKILL, _store, _start_store),
    "node": Fault(signal.SIGKILL, _nodes, _add_node),
}
FAULTS = {f"kill {name}": fault for name, fault in _PARTS.items()} | {
    f"stop {name}": replace(fault, sign=signal.SIGSTOP) for name, fault in _PARTS.items()
}


def pairs(round_: int) -> list[tuple[str, str]]:
    """Each part is killed while another one is stopped, and stopped while another one is killed: others in each of six
    rounds."""
    names = list(_PARTS)
    shift = 1 + round_ % (len(names) - 1)
    return [(f"kill {one}", f"stop {names[(n + shift) % len(names)]}") for n, one in enumerate(names)]


def end_of(hit: Hit, fleet: Fleet) -> float:
    """Return when nothing of what was hit is left, and the seconds that this took. Where nobody can reach it, as on a
    node that is cut off, it goes on, and ends by itself."""
    began = time.monotonic()
    if hit.node is not None:
        until(lambda: hit.node is not None and not fleet.alive(hit.node), STOPPED_S)
        hit.go_on()
    until(lambda: hit.gone, STOPPED_S, lacking=hit.left)
    if hit.node is not None:
        fleet.cluster.remove_node(hit.node, allow_graceful=False)
    return time.monotonic() - began


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

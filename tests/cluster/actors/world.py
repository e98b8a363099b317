"""A controller over the real policy and store, with processes played by the test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.actors.protocols import PackEnd
from polygraft.cluster.advance import advance_job, advance_pack
from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.events import (
    JobCancelled,
    JobStarted,
    JobSubmitted,
    PackOpened,
)
from polygraft.cluster.model import (
    Backbone,
    Device,
    Holding,
    Job,
    JobId,
    Limits,
    Pack,
    PackId,
    Replica,
    ReplicaId,
)
from polygraft.cluster.size import Size
from polygraft.cluster.states import JobState, PackState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import make_backbone, make_device, make_job

A, B = JobId("ftjob-a"), JobId("ftjob-b")


@dataclass
class Processes:
    """Effects whose processes end when the test says so."""

    opened: list[Pack] = field(default_factory=list)
    closed: list[PackId] = field(default_factory=list)
    over: list[PackEnd] = field(default_factory=list)
    present: list[Device] = field(default_factory=lambda: [make_device()])
    dead: list[str] = field(default_factory=list)
    going: list[str] = field(default_factory=list)
    refuse: bool = False
    served: list[str] = field(default_factory=list)
    sized: tuple[Size, ...] = ()

    def open_pack(self, pack: Pack) -> None:
        if self.refuse:
            raise RuntimeError("no such backbone")
        self.opened.append(pack)

    def close_pack(self, pack: PackId) -> None:
        self.closed.append(pack)

    def alive(self) -> Collection[PackId]:
        return {pack.id for pack in self.opened} - set(self.closed)

    def ended(self) -> Sequence[PackEnd]:
        return [end for end in self.over if end.pack not in self.closed]

    def serve(self, backbones: Collection[Backbone]) -> None:
        self.served = sorted(backbone.name for backbone in backbones)

    def devices(self) -> Collection[Device]:
        return self.present

    def sizes(self, backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
        return self.sized

    def draining(self) -> Collection[str]:
        return self.going

    def gone(self, replicas: Collection[Replica]) -> Collection[ReplicaId]:
        return [replica.id for replica in replicas if replica.actor in self.dead]


@dataclass
class World:
    """A store, a controller over it and the pack's worker, all driven step by step at a time of the test's own."""

    limits: Limits = field(default_factory=Limits)
    now: float = 100.0
    store: Store = field(default_factory=MemoryStore)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        put_backbone(self.store, make_backbone("b"), at=self.now)
        self.controller = self.start("one")

    def start(self, holder: str) -> Controller:
        return Controller(self.store, self.processes, limits=self.limits, holder=holder, clock=lambda: self.now)

    def submit(self, *names: str, **fields: Any) -> None:
        for name in names:
            job = make_job(name, **fields)
            self.store.commit([Write(keys.job(job.id), job, 0)], [JobSubmitted(record=job, at=self.now)])

    def settle(self, controller: Controller | None = None) -> None:
        """Rounds until nothing new is written."""
        leader = controller or self.controller
        if leader._lease is None:
            assert leader._take_over(steal=True)
        before = None
        while before != leader.snapshot.version:
            before = leader.snapshot.version
            leader.round()
            leader._catch_up()

    def work(self) -> None:
        """What a worker does with its commands, as far as the store shows it."""
        for pack in (one.value for one in self.store.scan(keys.PACKS)):
            if pack.state is PackState.OPENING:
                advance_pack(self.store, PackOpened(pack=pack.id, at=self.now))
            for _, entry in self.store.read(keys.commands(pack.id)):
                job = self.job(JobId(str(entry.get("job")))) if "job" in entry else None
                if job is None or job.final or job.pack != pack.id:
                    continue
                if entry["op"] == "admit" and job.state is JobState.QUEUED:
                    advance_job(
                        self.store, JobStarted(job=job.id, pack=pack.id, parameters=5, steps_total=9, at=self.now)
                    )
                if entry["op"] == "cancel":
                    advance_job(self.store, JobCancelled(job=job.id, at=self.now))

    def job(self, id: JobId) -> Job:
        found = self.store.get(keys.job(id))
        assert found is not None
        return found.value

    def held(self) -> list[Holding]:
        return [holding for one in self.store.scan(keys.DEVICES) for holding in one.value.holders]

    def packs(self) -> list[tuple[str, PackState]]:
        return [(one.value.id, one.value.state) for one in self.store.scan(keys.PACKS)]

    def running(self) -> PackId:
        """Jobs a and b running in the one pack."""
        self.submit("a", "b")
        for _ in range(2):
            self.settle()
            self.work()
        assert {self.job(A).state, self.job(B).state} == {JobState.RUNNING}
        return self.processes.opened[-1].id

"""The control plane under load, against a real Valkey whose every write is on disk: a round of decisions at 1,000
devices, submissions a second, lists of one tenant beside other tenants' jobs, and what stays in memory.

control_plane.py [--quick] [--json PATH]: prints a line a claim; 1 when one does not hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
from statistics import median, quantiles

import psutil
from figures import conclude
from measure import Claim, Op

from polygraft.cluster.actors.following import Following
from polygraft.cluster.decisions import Admit, Hold, OpenPack, Refuse
from polygraft.cluster.events import (
    BackboneAdded,
    DeviceJoined,
    Event,
    JobAdmitted,
    JobFailed,
    JobHeld,
    JobStarted,
    JobSubmitted,
    JobSucceeded,
    PackOpened,
    PackOpening,
)
from polygraft.cluster.model import (
    START,
    Backbone,
    Device,
    DeviceId,
    EventId,
    FileId,
    GraftId,
    Job,
    JobError,
    JobId,
    JobSpec,
    Limits,
    Snapshot,
    TenantId,
)
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, StoredEvent, Write
from polygraft.cluster.store.codec import encode_record
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer

DEVICES, QUEUED, TENANTS, IN_A_PACK = 1000, 10_000, 100, 8
ROUNDS, QUICK_ROUNDS = 400, 60
WRITERS = 16
SPEC = JobSpec(backbone="b", training_file=FileId("file-1"), peft="lora(r=8)")
NUMBERS = count()


def a_job(tenant: int, at: float) -> Job:
    return Job(
        id=JobId(f"ftjob-{next(NUMBERS):08x}"),
        tenant=TenantId(f"tenant-{tenant:03}"),
        spec=SPEC,
        created_at=at,
        parameters=500_000,
        reason=Reason.TURN,
    )


class Fleet:
    """A full one, followed event by event; what policy decides happens at once."""

    def __init__(self) -> None:
        self.following, self.now, self._events = Following(Snapshot()), 1000.0, count(1)
        self.limits = Limits(max_jobs=IN_A_PACK)
        backbone = Backbone(
            name="b",
            folder="",
            dtype="auto",
            quantise=None,
            fingerprint="",
            context_length=None,
            added_at=0.0,
            asked_at=0.0,
        )
        self.tell(BackboneAdded(record=backbone, at=self.now))
        for index in range(DEVICES):
            node = f"node-{index // 8:03}"
            device = Device(
                id=DeviceId(f"{node}/cuda{index % 8}"),
                node=node,
                kind="cuda",
                index=index % 8,
                cores=8,
                bytes=80 << 30,
                speed=1e14,
            )
            self.tell(DeviceJoined(record=device, at=self.now))

    def tell(self, event: Event) -> None:
        self.following.apply(StoredEvent(EventId(f"{next(self._events)}-0"), self.now, event))

    def submit(self, jobs: int) -> None:
        for number in range(jobs):
            self.tell(JobSubmitted(record=a_job(number % TENANTS, self.now + number * 1e-4), at=self.now))

    def round(self) -> tuple[float, float, int]:
        """How long policy took, of that on the processor, and how often others took the processor meanwhile."""
        seen = replace(self.following.snapshot, now=self.now, limits=self.limits)
        before = preemptions()
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        decisions = decide(seen, self.following.standing)
        took = time.perf_counter() - begin, time.thread_time() - begin_cpu, preemptions() - before
        for decision in decisions:
            match decision:
                case OpenPack(pack=pack, backbone=name, devices=devices, bytes=bytes_, reason=reason):
                    self.tell(
                        PackOpening(
                            pack=pack, backbone=name, devices=devices, bytes=bytes_, epoch=1, reason=reason, at=self.now
                        )
                    )
                    self.tell(PackOpened(pack=pack, at=self.now))
                case Admit(job=job, pack=pack):
                    self.tell(JobAdmitted(job=job, pack=pack, at=self.now))
                    self.tell(JobStarted(job=job, pack=pack, parameters=500_000, steps_total=100, at=self.now))
                case Hold(job=job, reason=reason):
                    self.tell(JobHeld(job=job, reason=reason, at=self.now))
                case Refuse(job=job, reason=reason):
                    self.tell(JobFailed(job=job, error=JobError(reason.value, ""), at=self.now))
        return took

    def end_some(self, chance: random.Random, jobs: int) -> None:
        active = [job for jobs_ in self.following.standing.active.values() for job in jobs_]
        for job in chance.sample(active, min(jobs, len(active))):
            self.tell(ended(job, self.now))


def preemptions() -> int:
    """Of this thread, against its will, so far."""
    return getrusage(RUSAGE_THREAD).ru_nivcsw


def ended(job: JobId, at: float) -> JobSucceeded:
    graft = GraftId(f"graft-{job}")
    return JobSucceeded(
        job=job, model=f"{job}@1", graft=graft, step=9, trained_tokens=9, loss_before=2.0, loss_after=1.0, at=at
    )


def deciding(rounds: int) -> Iterator[Claim]:
    """Rounds in which some jobs ended and as many came, of a fleet that is full with a long queue."""
    fleet, chance = Fleet(), random.Random(0)
    fleet.submit(QUEUED + DEVICES * IN_A_PACK)
    while len(fleet.following.standing.loads) < DEVICES or fleet.following.standing.queues == {}:
        fleet.now += 1.0
        fleet.round()
    fleet.round()
    took, followed, events = [], 0.0, 0
    for _ in range(rounds):
        fleet.now += 0.5
        begin = time.perf_counter()
        fleet.end_some(chance, 8)
        fleet.submit(8)
        followed, events = followed + time.perf_counter() - begin, events + 16
        took.append(fleet.round())
    queued = sum(len(queue) for queues in fleet.following.standing.queues.values() for queue in queues.values())
    assert queued == QUEUED, queued
    wall, cpu, preempted = zip(*took, strict=True)
    yield claim("decide_p99_ms", 1e3 * quantiles(wall, n=100)[98], "ms", 10.0, "<")
    yield claim("decide_p99_cpu_ms", 1e3 * quantiles(cpu, n=100)[98], "ms")
    # What a round waits beyond its own work, it waits for others' processes: a quiet machine has none of these.
    yield claim("decide_rounds_preempted", sum(map(bool, preempted)) / len(took), "of the rounds")
    yield claim("decide_median_ms", 1e3 * median(wall), "ms")
    yield claim("events_followed_per_s", events / followed, "1/s", 500.0, ">=")


def storing(store: Store, jobs: int) -> Iterator[Claim]:
    """Submissions as the API makes them: the tenant's unfinished jobs counted, then record and event in one commit."""
    mine = [a_job(TENANTS, 1.0 + number) for number in range(100)]
    submit_all(store, mine)
    before = latencies(store, TENANTS)
    others = [a_job(number % TENANTS, 1000.0 + number) for number in range(jobs)]
    begin = time.perf_counter()
    submit_all(store, others)
    yield claim("submissions_per_s", jobs / (time.perf_counter() - begin), "1/s", 500.0, ">=")
    after = latencies(store, TENANTS)
    for name in before:
        yield claim(f"{name}_beside_{jobs}_over_alone", median(after[name]) / median(before[name]), "ratio", 1.5, "<")
        yield claim(f"{name}_p99_ms", 1e3 * quantiles(after[name], n=100)[98], "ms")


def submit_all(store: Store, jobs: Sequence[Job]) -> None:
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(lambda job: submit(store, job), jobs))


def submit(store: Store, job: Job) -> None:
    store.count(keys.unfinished_jobs_of(job.tenant))
    store.submit(None, "", [Write(keys.job(job.id), job, 0)], [JobSubmitted(record=job, at=job.created_at)])


def latencies(store: Store, tenant: int) -> dict[str, list[float]]:
    """Of one request at a time: a page of the tenant's jobs, and one job more."""
    name = TenantId(f"tenant-{tenant:03}")
    listed = timed(lambda: store.newest(keys.jobs_of(name), limit=21), 200)
    return {"list": listed, "submit": timed(lambda: submit(store, a_job(tenant, 1e6)), 200)}


def timed(work: Callable[[], object], times: int) -> list[float]:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return took


def remembering(rounds: int) -> Iterator[Claim]:
    """Whether what a controller holds grows with the jobs that are over."""
    fleet, chance, process = Fleet(), random.Random(0), psutil.Process()
    fleet.submit(2 * DEVICES)

    def pass_by() -> None:
        for _ in range(rounds):
            fleet.now += 1.0
            fleet.round()
            fleet.end_some(chance, 40)
            fleet.submit(40)

    pass_by()
    held, size = process.memory_info().rss, len(encode_record(keys.SNAPSHOT, fleet.following.snapshot))
    pass_by()
    grown = len(encode_record(keys.SNAPSHOT, fleet.following.snapshot)) / size
    yield claim("snapshot_after_twice_the_jobs", grown, "ratio", 1.1, "<")
    yield claim("controller_growth_mib", (process.memory_info().rss - held) / 2**20, "MiB", 50.0, "<")


def claim(id: str, value: float, unit: str, goal: float | None = None, op: Op | None = None) -> Claim:
    holds = None if goal is None else value < goal if op == "<" else value >= goal
    return Claim(id, value, unit, goal, op, holds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="control_plane.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of it: shows that it works, proves nothing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rounds = QUICK_ROUNDS if given.quick else ROUNDS
    claims = [*deciding(rounds), *remembering(rounds // 4)]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="polygraft-bench-"))
        server = stack.enter_context(EmbeddedServer(Path(folder)))
        store = stack.enter_context(closing(connect(server.url)))
        claims += storing(store, QUEUED // 10 if given.quick else QUEUED)
        log = len(store.events(START, limit=100_000))
    claims.append(claim("events_in_the_log", log, "events"))
    return conclude("control_plane", claims, quick=given.quick, json_path=given.json)


if __name__ == "__main__":
    sys.exit(main())

"""Which half-empty packs are joined, so that their devices are free, and which empty ones are closed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from polygraft.cluster.decisions import ClosePack, Move
from polygraft.cluster.model import Job, Limits, Pack, PackId, Snapshot
from polygraft.cluster.policy.budget import bytes_of, limits_of
from polygraft.cluster.policy.room import Room, paces
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import JobState, Reason


def joining(packs: Sequence[Pack], standing: Standing, snapshot: Snapshot) -> list[Move]:
    """Moves that empty the emptiest of a kind's open packs into the others, the fullest first.

    It is half-empty at most, and all of its jobs go or none. A job goes only where its steps are computed by the same
    class of device, so that its bits stay what they would have been. One join at a time: none begins while a job of the
    kind is on its way.
    """
    limits = _limits(packs, snapshot)
    counts = sorted((count, pack.id) for pack in packs if (count := standing.count(pack.id)))
    if len(counts) < 2 or 2 * counts[0][0] > limits.max_jobs:
        return []
    rooms = {
        pack.id: Room(pack, limits, standing.load(pack.id), paces(snapshot, pack.id))
        for pack in packs
        if standing.count(pack.id)
    }
    if any(job.moving_to is not None for room in rooms.values() for job in room.load.jobs.values()):
        return []
    source = rooms.pop(counts[0][1])
    if source.lasts_s() <= limits.moving_s:
        return []
    others = sorted(rooms.values(), key=lambda room: room.order)
    moves = []
    for job in sorted(source.load.jobs.values(), key=lambda job: (-bytes_of(job), job.id)):
        target = next((room for room in others if room.takes(job) and _alike(room, job)), None)
        if target is None or not _movable(job):
            return []
        target.take(job)
        moves.append(Move(job.id, source.pack.id, target.pack.id))
    return moves


def closings(
    packs: Sequence[Pack], standing: Standing, last_end: Mapping[PackId, float], snapshot: Snapshot
) -> Iterator[ClosePack]:
    """Open packs of a kind that nobody waits for and that have no job, nor one on its way: at once where another one
    has jobs and room for more, else when they have been idle for long. `last_end` is when a pack's last job ended."""
    limits = _limits(packs, snapshot)
    spare = any(0 < standing.count(pack.id) < limits.max_jobs for pack in packs)
    for pack in sorted(packs, key=lambda pack: pack.id):
        if standing.count(pack.id):
            continue
        if spare:
            yield ClosePack(pack.id, Reason.JOINED)
        elif snapshot.now - max(pack.opened_at, last_end.get(pack.id, 0.0)) >= limits.idle_s:
            yield ClosePack(pack.id, Reason.IDLE)


def _limits(packs: Sequence[Pack], snapshot: Snapshot) -> Limits:
    """Of packs of one kind."""
    return limits_of(snapshot.limits, snapshot.backbones.get(packs[0].backbone) if packs else None)


def _movable(job: Job) -> bool:
    return job.state is JobState.RUNNING and not job.stopping and not job.cancel_requested


def _alike(room: Room, job: Job) -> bool:
    """Whether the pack's jobs are computed by the class of device that computes this one."""
    return {one.device_class for one in room.load.jobs.values()} == {job.device_class}

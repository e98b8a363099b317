"""The states a job and a pack pass through, every legal step between them, and the typed reasons of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    """OpenAI's words for a fine-tuning job; `validating_files` exists only in the API, while a file is checked."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SearchState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PackState(StrEnum):
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a decision was taken, or why a job waits or went back to the queue."""

    FITS = "fits_the_pack"  # admit: the pack's budget has room
    TURN = "waits_its_turn"  # hold: others that wait for packs of its kind come first
    JOBS_WAIT = "jobs_wait"  # open: jobs wait and no pack of their backbone takes them
    PACK_OPENING = "pack_is_opening"  # hold: the pack starts; loading the backbone takes a while
    PACK_CLOSING = "pack_is_closing"  # hold: the pack takes no more jobs; a new one follows it
    PACK_FULL = "pack_has_all_its_jobs"  # hold: the pack's limit on jobs is reached
    PACK_MEMORY = "pack_memory_is_taken"  # hold: fits an empty pack, not with the present jobs
    TENANT_LIMIT = "tenant_has_all_its_jobs"  # hold: as many jobs of its tenant are in packs as may be
    PACK_BACKOFF = "last_pack_failed"  # hold: a new pack is tried after a pause
    NO_DEVICE = "no_device_is_free"  # hold, unload: no device has the memory left that a pack takes
    NO_BACKBONE = "its_backbone_was_removed"  # refuse: nobody can say any more what it is to be trained on
    TOO_LARGE = "too_large_for_any_pack"  # refuse: does not fit an empty pack
    PACKS_FAILED = "its_packs_failed"  # refuse: too many packs failed with the job as a suspect
    REQUESTED = "requested"  # cancel: its tenant asked
    OWNER_LOST = "owner_lease_expired"  # cancel: the search that owns it is gone
    IDLE = "idle"  # close, unload: no jobs, or nobody who asks, for a while
    ASKED = "asked_for"  # load: somebody asks the backbone
    YIELDED = "others_wait_for_its_device"  # close: jobs for which there is no pack at all waited for very long
    NODE_DRAINS = "its_node_drains"  # close: its jobs go on elsewhere from their last step
    STOPPING = "the_service_stops"  # close, requeue: its jobs go on from their last step when the service does
    JOINED = "joined"  # move, close: the jobs of a half-empty pack ride in another of its kind
    MOVING = "moving"  # hold: it left its pack for another one, which has kept a place
    PACK_FAILED = "pack_failed"  # requeue: the pack's process ended with an error
    PACK_LOST = "pack_lost"  # requeue: the pack did not survive a restart of the service
    PACK_CLOSED = "pack_closed"  # requeue: the pack ended before the job did


class IllegalTransition(Exception):
    """A step that no edge of the table allows; the message names both ends."""

    def __init__(self, what: str, old: str, new: str) -> None:
        super().__init__(f"{what}: {old} -> {new} is not a legal transition")
        self.what = what
        self.old = old
        self.new = new


JOB_TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        {
            JobState.RUNNING,  # the pack's worker took it in
            JobState.FAILED,  # refused, unreadable data, or its packs failed too often
            JobState.CANCELLED,  # cancelled before it ran
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.RUNNING,  # the worker restarted and took it up from its checkpoint
            JobState.QUEUED,  # its pack ended without it, or it left for another; resumes there from its checkpoint
            JobState.SUCCEEDED,  # published
            JobState.FAILED,  # non-finite losses, unreadable data, or its packs failed too often
            JobState.CANCELLED,  # the worker dropped it after a cancel command
        }
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

PACK_TRANSITIONS: Mapping[PackState, frozenset[PackState]] = {
    PackState.OPENING: frozenset(
        {
            PackState.OPEN,  # the worker loaded the backbone and reads commands
            PackState.CLOSED,  # the host ended before it opened, without an error
            PackState.FAILED,  # no process, no memory, no backbone
        }
    ),
    PackState.OPEN: frozenset(
        {
            PackState.OPEN,  # its worker restarted
            PackState.CLOSING,  # idle, or the service stops
            PackState.CLOSED,  # the host ended by itself, without an error
            PackState.FAILED,  # the host ended with an error, or was lost
        }
    ),
    PackState.CLOSING: frozenset(
        {
            PackState.CLOSING,  # its worker restarted and reads the command again
            PackState.CLOSED,  # the host ended as asked
            PackState.FAILED,  # the host ended with an error, or was lost
        }
    ),
    PackState.CLOSED: frozenset(),
    PackState.FAILED: frozenset(),
}


def check_job(what: str, old: JobState, new: JobState) -> None:
    """Raise IllegalTransition unless a job may go from `old` to `new`."""
    if new not in JOB_TRANSITIONS[old]:
        raise IllegalTransition(what, old, new)


def check_pack(what: str, old: PackState, new: PackState) -> None:
    """Raise IllegalTransition unless a pack may go from `old` to `new`."""
    if new not in PACK_TRANSITIONS[old]:
        raise IllegalTransition(what, old, new)


def is_final(state: JobState | PackState) -> bool:
    """Whether nothing can follow `state`, computed from the tables."""
    return not (JOB_TRANSITIONS[state] if isinstance(state, JobState) else PACK_TRANSITIONS[state])

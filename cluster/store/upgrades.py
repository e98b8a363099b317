"""Records and events of older schemas, brought to the fields of the next before they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from polygraft.cluster.store.base import JSON
from polygraft.grafts.grammar import parse
from polygraft.grafts.spec import SpecError

Body = Mapping[str, JSON]


def _graft_1(body: Body) -> Body:
    """Schema 2 keeps the context length."""
    return {**body, "context_length": _context_length(str(body.get("method")))}


def _graft_published_1(body: Body) -> Body:
    graft = body.get("graft")
    return {**body, "graft": _graft_1(graft) if isinstance(graft, Mapping) else graft}


def _job_1(body: Body) -> Body:
    """Schema 2 keeps the class of the device."""
    return {**body, "device_class": None}


def _job_submitted_1(body: Body) -> Body:
    record = body.get("record")
    return {**body, "record": _job_1(record) if isinstance(record, Mapping) else record}


def _snapshot_1(body: Body) -> Body:
    jobs = body.get("jobs")
    if not isinstance(jobs, list):
        return body
    return {**body, "jobs": [_job_1(job) if isinstance(job, Mapping) else job for job in jobs]}


@lru_cache(maxsize=1024)
def _context_length(method: str) -> int:
    """0 for an imported graft that is described in words: the engine asks the graft, and refuses what does not fit."""
    try:
        return parse(method).context_length
    except SpecError:
        return 0


# From (type, schema) to the body of schema + 1.
UPGRADES: Mapping[tuple[str, int], Callable[[Body], Body]] = {
    ("Graft", 1): _graft_1,
    ("GraftPublished", 1): _graft_published_1,
    ("Job", 1): _job_1,
    ("JobStarted", 1): _job_1,
    ("JobSubmitted", 1): _job_submitted_1,
    ("Snapshot", 1): _snapshot_1,
}

"""A job's log and metric streams as one list of OpenAI's fine-tuning events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, cast

from pydantic import JsonValue

from polygraft.cluster.model import Job
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, OLDEST, EntryId, Store, StreamKey
from polygraft.serving.http.schemas import FineTuningJobEvent

Level = Literal["info", "warn", "error"]
_LEVELS: Mapping[str, Level] = {"info": "info", "warn": "warn", "warning": "warn", "error": "error"}
_BATCH = 1000


def events_of(store: Store, job: Job) -> list[FineTuningJobEvent]:
    """All of the job's events, newest first."""
    found = [(_order(id, entry), _message(job, id, entry)) for id, entry in _entries(store, keys.log(job.id))]
    found += [(_order(id, entry), _metrics(job, id, entry)) for id, entry in _entries(store, keys.metrics(job.id))]
    return [event for _, event in sorted(found, key=lambda pair: (pair[0], pair[1].type), reverse=True)]


def _entries(store: Store, stream: StreamKey) -> Iterator[tuple[EntryId, Mapping[str, JSON]]]:
    after = OLDEST
    while batch := store.read(stream, after, limit=_BATCH):
        yield from batch
        after = batch[-1][0]


def _message(job: Job, id: EntryId, entry: Mapping[str, JSON]) -> FineTuningJobEvent:
    data = entry.get("data")
    return FineTuningJobEvent(
        id=f"ftevent-{job.id.removeprefix('ftjob-')}-log-{id}",
        created_at=int(_order(id, entry)[0]),
        level=_LEVELS.get(str(entry.get("level")), "info"),
        message=str(entry.get("message", "")),
        type="message",
        data=cast(dict[str, JsonValue], dict(data)) if isinstance(data, Mapping) else {},
    )


def _metrics(job: Job, id: EntryId, entry: Mapping[str, JSON]) -> FineTuningJobEvent:
    values = {name: value for name, value in entry.items() if name != "at"}
    loss = values.get("loss")
    return FineTuningJobEvent(
        id=f"ftevent-{job.id.removeprefix('ftjob-')}-metrics-{id}",
        created_at=int(_order(id, entry)[0]),
        level="info",
        message=f"step {values.get('step')}: loss {loss:.4f}"
        if isinstance(loss, float)
        else f"step {values.get('step')}",
        type="metrics",
        data=cast(dict[str, JsonValue], values),
    )


def _order(id: EntryId, entry: Mapping[str, JSON]) -> tuple[float, int, int]:
    """By the writer's clock, and within a stream by its ids."""
    milliseconds, _, sequence = id.partition("-")
    at = entry.get("at")
    return float(at) if isinstance(at, int | float) else int(milliseconds) / 1000, int(milliseconds), int(sequence or 0)

"""Write a fact: the event and the record it changes in one commit, by compare-and-swap against the other writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite

from polygraft.cluster.events import Event, JobEvent, PackEvent, PackOpening
from polygraft.cluster.evolve import job_after, opening, pack_after
from polygraft.cluster.model import Job, JobId, Pack
from polygraft.cluster.scores import Judged
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Append, Conflict, Fence, Key, R, Store, Write

TRIES = 20  # other writers of one record: the ingress and one worker or controller


def advance_job(store: Store, event: JobEvent, *, fence: Fence | None = None, appends: Sequence[Append] = ()) -> Job:
    """The job after the event, both written. Raises IllegalTransition (for an absent job too) and Fenced."""

    def change(found: Job | None) -> Job:
        return job_after(_present(found, event.job, event), event)

    return swap(store, keys.job(event.job), change, events=(event,), appends=appends, fence=fence)


def advance_pack(
    store: Store,
    event: PackEvent,
    *,
    fence: Fence | None = None,
    appends: Sequence[Append] = (),
    with_writes: Callable[[], Sequence[Write]] = tuple,
) -> Pack:
    """The pack after the event, both written, and what `with_writes` gives. Raises as `advance_job` does, and what
    `with_writes` raises."""

    def change(found: Pack | None) -> Pack:
        if not isinstance(event, PackOpening):
            return pack_after(_present(found, event.pack, event), event)
        if found is not None:
            raise IllegalTransition(event.pack, found.state, "opening")
        return opening(event)

    return swap(
        store, keys.pack(event.pack), change, events=(event,), appends=appends, fence=fence, with_writes=with_writes
    )


def record_progress(  # noqa: PLR0913
    store: Store,
    job: JobId,
    *,
    step: int,
    trained_tokens: int,
    loss_before: float | None = None,
    loss_after: float | None = None,
    judged: Judged | None = None,
    fence: Fence | None = None,
) -> None:
    """Note how far an unfinished job is, without an event. Losses that are None or not finite change nothing; neither
    does None for what is judged.

    Raises as `advance_job` does.
    """

    def change(found: Job | None) -> Job:
        value = _present(found, job, None)
        if value.final:
            raise IllegalTransition(job, value.state, "progress")
        before = value.loss_before if loss_before is None or not isfinite(loss_before) else loss_before
        after = value.loss_after if loss_after is None or not isfinite(loss_after) else loss_after
        said = judged or value.judged
        return replace(
            value, step=step, trained_tokens=trained_tokens, loss_before=before, loss_after=after, judged=said
        )

    swap(store, keys.job(job), change, fence=fence)


def swap(  # noqa: PLR0913
    store: Store,
    key: Key[R],
    change: Callable[[R | None], R],
    *,
    events: Sequence[Event] = (),
    appends: Sequence[Append] = (),
    fence: Fence | None = None,
    with_writes: Callable[[], Sequence[Write]] = tuple,
) -> R:
    """Write `change(record)` and what `with_writes` gives, both computed again whenever another writer was faster.
    Raises Conflict after TRIES."""
    for attempt in range(TRIES):
        found = store.get(key)
        value = change(found.value if found else None)
        try:
            writes = [Write(key, value, found.version if found else 0), *with_writes()]
            store.commit(writes, events, appends=appends, fence=fence)
            return value
        except Conflict:
            if attempt == TRIES - 1:
                raise
    raise AssertionError("the loop returns or raises")


def _present(found: R | None, what: str, event: Event | None) -> R:
    if found is None:
        raise IllegalTransition(what, "absent", type(event).__name__ if event else "progress")
    return found

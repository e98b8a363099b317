"""In which lists a record stands, by its fields. A store keeps them in the commit that writes the record, so that a
tenant's records are found without a look at anybody else's."""

from __future__ import annotations

from contextlib import suppress

from polygraft.cluster.model import DataFile, Job, Record, Search
from polygraft.cluster.states import SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, Key, Listing, Store, StreamKey, Write

_RELISTED = StreamKey("lists")  # has an entry once all records of before there were lists are in them


def lists_of(value: Record | None) -> tuple[Listing[Record], ...]:
    """Names of the record's lists; None, as one that is deleted, has none."""
    match value:
        case Job(tenant=tenant):
            return (keys.jobs_of(tenant), *(() if value.final else (keys.unfinished_jobs_of(tenant),)))
        case Search(tenant=tenant, state=state):
            running = (keys.running_searches_of(tenant), keys.RUNNING_SEARCHES)
            return (keys.searches_of(tenant), *(running if state is SearchState.RUNNING else ()))
        case DataFile(tenant=tenant):
            return (keys.files_of(tenant),)
        case _:
            return ()


def place_of(value: Record) -> str:
    """Where it stands in each of them: texts in order of their records' time, then key."""
    match value:
        case Job(id=job):
            key: Key[Record] = keys.job(job)
        case Search(id=search):
            key = keys.search(search)
        case DataFile(id=file):
            key = keys.file(file)
        case _:
            raise ValueError(f"a {type(value).__name__} stands in no list")
    return f"{value.created_at:020.6f} {key}"


def key_at(place: str) -> Key[Record]:
    """Of the record there."""
    return Key(place.partition(" ")[2])


def relist(store: Store) -> None:
    """Put the records that an older version wrote into their lists, once. Whoever writes one meanwhile does it."""
    if store.read(_RELISTED, limit=1):
        return
    for prefix in (keys.JOBS, keys.FILES):
        for found in store.scan(prefix):
            with suppress(Conflict):
                store.commit([Write(found.key, found.value, found.version)])
    store.append(_RELISTED, {"schema": 1})

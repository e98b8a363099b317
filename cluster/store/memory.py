"""The store in one process's memory: the twin that tests use. Nothing survives the process."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import cast

from polygraft.cluster.events import Event
from polygraft.cluster.model import EventId, Record
from polygraft.cluster.store.base import (
    IDEMPOTENCY_S,
    JSON,
    OLDEST,
    Append,
    Committed,
    Conflict,
    EntryId,
    Fence,
    Fenced,
    IdempotencyConflict,
    Key,
    Lease,
    Listing,
    Prefix,
    R,
    StoredEvent,
    StoreUnavailable,
    StreamKey,
    Submitted,
    Versioned,
    Write,
)
from polygraft.cluster.store.codec import (
    decode_entry,
    decode_event,
    decode_record,
    encode_entry,
    encode_event,
    encode_record,
)
from polygraft.cluster.store.lists import key_at, lists_of, place_of


class MemoryStore:
    """Keeps the same text as the real store, so that what cannot be encoded fails here too; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._changed = Condition()
        self._version = 0
        self._records: dict[str, tuple[str, int]] = {}
        self._lists: dict[str, list[str]] = {}  # their places, in order
        self._listed: dict[str, tuple[str, tuple[str, ...]]] = {}  # each record's place, and in which lists
        self._log = _Stream()
        self._streams: dict[str, _Stream] = {}
        self._leases: dict[str, _Held] = {}
        self._submissions: dict[str, tuple[str, Key[Record], float]] = {}
        self._open = True

    def get(self, key: Key[R]) -> Versioned[R] | None:
        with self._changed:
            self._check_open()
            found = self._records.get(key)
        return None if found is None else Versioned(key, decode_record(key, found[0]), found[1])

    def scan(self, prefix: Prefix[R], *, after: Key[R] | None = None, limit: int | None = None) -> list[Versioned[R]]:
        with self._changed:
            self._check_open()
            names = sorted(key for key in self._records if key.startswith(prefix) and key > (after or ""))[:limit]
            found = [(cast("Key[R]", Key(name)), *self._records[name]) for name in names]
        return [Versioned(key, decode_record(key, text), version) for key, text, version in found]

    def newest(self, listing: Listing[R], *, before: R | None = None, limit: int | None = None) -> list[Versioned[R]]:
        with self._changed:
            self._check_open()
            places = self._lists.get(listing, [])
            older = places if before is None else places[: bisect_left(places, place_of(before))]
            names = [key_at(place) for place in older[::-1][:limit]]
            found = [(cast("Key[R]", name), *self._records[name]) for name in names]
        return [Versioned(key, decode_record(key, text), version) for key, text, version in found]

    def count(self, listing: Listing[R]) -> int:
        with self._changed:
            self._check_open()
            return len(self._lists.get(listing, ()))

    def commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event] = (),
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
    ) -> Committed:
        texts = [None if write.value is None else encode_record(write.key, write.value) for write in writes]
        log = [encode_event(event) for event in events]
        entries = [encode_entry(append.entry) for append in appends]
        with self._changed:
            self._check_open()
            self._check(writes, fence)
            self._version += 1
            for write, text in zip(writes, texts, strict=True):
                if text is None:
                    self._records.pop(write.key, None)
                else:
                    self._records[write.key] = (text, self._version)
                self._list(write.key, write.value)
            ids = [EventId(self._log.add(line, self._clock(), None)) for line in log]
            for append, entry in zip(appends, entries, strict=True):
                self._stream(append.stream).add(entry, self._clock(), append.maxlen)
            self._changed.notify_all()
            return Committed(self._version, tuple(ids))

    def submit(
        self, idempotency: str | None, digest: str, writes: Sequence[Write], events: Sequence[Event] = ()
    ) -> Submitted:
        key = writes[0].key
        with self._changed:
            self._check_open()
            first = None if idempotency is None else self.submitted(idempotency, digest)
            if first is not None:
                return Submitted(False, first)
            self.commit(writes, events)
            if idempotency is not None:
                self._submissions[idempotency] = (digest, key, self._clock() + IDEMPOTENCY_S)
            return Submitted(True, key)

    def submitted(self, idempotency: str, digest: str) -> Key[Record] | None:
        with self._changed:
            self._check_open()
            used, first, until = self._submissions.get(idempotency, (digest, None, 0.0))
            if until <= self._clock():
                return None
            if used != digest:
                raise IdempotencyConflict(idempotency)
            return first

    def acquire(
        self, scope: str, holder: str, ttl_s: float, *, steal: bool = False, fence: Fence | None = None
    ) -> Lease | None:
        with self._changed:
            self._check_open()
            self._check([], fence)
            held = self._leases.get(scope, _Held())
            if not steal and held.until > self._clock() and held.holder != holder:
                return None
            self._leases[scope] = _Held(holder, held.epoch + 1, self._clock() + ttl_s)
            return Lease(scope, holder, held.epoch + 1, ttl_s)

    def renew(self, lease: Lease) -> bool:
        with self._changed:
            self._check_open()
            return self._extend(lease, lease.ttl_s)

    def release(self, lease: Lease) -> None:
        with self._changed:
            self._check_open()
            self._extend(lease, 0.0)

    def events(self, after: EventId, *, limit: int = 1000, wait_s: float = 0.0) -> list[StoredEvent]:
        found = self._wait(lambda: self._log.after(after, limit), wait_s)
        return [StoredEvent(EventId(id), at, decode_event(text)) for id, at, text in found]

    def trim(self, upto: EventId) -> None:
        with self._changed:
            self._check_open()
            self._log.trim(upto)

    def append(self, stream: StreamKey, entry: Mapping[str, JSON], *, maxlen: int | None = None) -> EntryId:
        text = encode_entry(entry)
        with self._changed:
            self._check_open()
            id = self._stream(stream).add(text, self._clock(), maxlen)
            self._changed.notify_all()
            return EntryId(id)

    def read(
        self, stream: StreamKey, after: EntryId = OLDEST, *, limit: int = 1000, wait_s: float = 0.0
    ) -> list[tuple[EntryId, Mapping[str, JSON]]]:
        found = self._wait(lambda: self._stream(stream).after(after, limit), wait_s)
        return [(EntryId(id), decode_entry(text)) for id, _, text in found]

    def durable(self) -> None:
        self.ping()

    def ping(self) -> None:
        with self._changed:
            self._check_open()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the in-memory store was closed")

    def _check(self, writes: Sequence[Write], fence: Fence | None) -> None:
        if fence is not None:
            current = self._leases.get(fence.scope, _Held()).epoch
            if current != fence.epoch:
                raise Fenced(fence.scope, fence.epoch, current)
        for write in writes:
            found = self._records.get(write.key, ("", 0))[1]
            if write.expected is not None and write.expected != found:
                raise Conflict(write.key, write.expected, found)

    def _list(self, key: Key[Record], value: Record | None) -> None:
        place, lists = self._listed.pop(key, ("", ()))
        for name in lists:
            self._lists[name].remove(place)
        if value is not None and (lists := lists_of(value)):
            self._listed[key] = place_of(value), lists
            for name in lists:
                insort(self._lists.setdefault(name, []), place_of(value))

    def _extend(self, lease: Lease, ttl_s: float) -> bool:
        held = self._leases.get(lease.scope, _Held())
        if held.epoch != lease.epoch:
            return False
        self._leases[lease.scope] = _Held(held.holder, held.epoch, self._clock() + ttl_s)
        return True

    def _stream(self, stream: StreamKey) -> _Stream:
        return self._streams.setdefault(stream, _Stream())

    def _wait(self, look: Callable[[], list[tuple[str, float, str]]], wait_s: float) -> list[tuple[str, float, str]]:
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                self._check_open()
                if found := look():
                    return found
                if (left := deadline - time.monotonic()) <= 0:
                    return []
                self._changed.wait(left)


@dataclass(frozen=True, slots=True)
class _Held:
    holder: str = ""
    epoch: int = 0
    until: float = 0.0


@dataclass(slots=True)
class _Stream:
    """Entries (id, time, text), ids (milliseconds, sequence) strictly growing even when the clock does not."""

    ids: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    last: tuple[int, int] = (0, 0)

    def add(self, text: str, now: float, maxlen: int | None) -> str:
        stamp = int(now * 1000)
        self.last = (stamp, 0) if stamp > self.last[0] else (self.last[0], self.last[1] + 1)
        self.ids.append(self.last)
        self.texts.append(text)
        if maxlen is not None:
            self._drop(max(0, len(self.ids) - maxlen))
        return _text(self.last)

    def after(self, id: str, limit: int) -> list[tuple[str, float, str]]:
        start = bisect_right(self.ids, _parse(id))
        chosen = zip(self.ids[start : start + limit], self.texts[start : start + limit], strict=True)
        return [(_text(id), id[0] / 1000, text) for id, text in chosen]

    def trim(self, upto: str) -> None:
        self._drop(bisect_right(self.ids, (_parse(upto)[0], _parse(upto)[1] - 1)))

    def _drop(self, count: int) -> None:
        del self.ids[:count], self.texts[:count]


def _parse(id: str) -> tuple[int, int]:
    stamp, _, sequence = id.partition("-")
    return int(stamp), int(sequence)


def _text(id: tuple[int, int]) -> str:
    return f"{id[0]}-{id[1]}"

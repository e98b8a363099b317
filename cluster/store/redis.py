"""The store on Redis or Valkey, with commands of Redis 6.2: Lua scripts for what is atomic, streams for logs.

An answered write is on disk: by WAITAOF where the server has it, else the server must run with appendfsync always.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from polygraft.cluster.store.wire import Argument, Wire

_BLOCK_S = 2.0  # one blocking read; well below the wire's timeout
_PAGE = 500


class RedisStore:
    """Everything lies under `prefix`, so that stores can share a server; a `patient` one waits where the server refuses
    to write."""

    def __init__(self, url: str, *, prefix: str = "polygraft:", patient: bool = False) -> None:
        self._wire = Wire(url, patient=patient)
        self._prefix = prefix

    def get(self, key: Key[R]) -> Versioned[R] | None:
        return _versioned(key, self._wire.call("HMGET", self._record(key), "version", "text"))

    def scan(self, prefix: Prefix[R], *, after: Key[R] | None = None, limit: int | None = None) -> list[Versioned[R]]:
        records: list[Versioned[R]] = []
        low = f"[{prefix}" if after is None or after < prefix else f"({after}"
        high = b"(" + prefix.encode() + b"\xff"
        while limit is None or len(records) < limit:
            page = _PAGE if limit is None else min(_PAGE, limit - len(records))
            names = self._wire.call("ZRANGEBYLEX", self._key("index"), low, high, "LIMIT", 0, page)
            found: list[Key[R]] = [Key(name.decode()) for name in cast(list[bytes], names)]
            rows = self._wire.calls([("HMGET", self._record(key), "version", "text") for key in found])
            records += [one for key, row in zip(found, rows, strict=True) if (one := _versioned(key, row))]
            if len(found) < page:
                break
            low = f"({found[-1]}"
        return records

    def newest(self, listing: Listing[R], *, before: R | None = None, limit: int | None = None) -> list[Versioned[R]]:
        high = "+" if before is None else f"({place_of(before)}"
        bound = () if limit is None else ("LIMIT", 0, limit)
        places = self._wire.call("ZREVRANGEBYLEX", self._list(listing), high, "-", *bound)
        found = [cast("Key[R]", key_at(place.decode())) for place in cast(list[bytes], places)]
        rows = self._wire.calls([("HMGET", self._record(key), "version", "text") for key in found])
        return [one for key, row in zip(found, rows, strict=True) if (one := _versioned(key, row))]

    def count(self, listing: Listing[R]) -> int:
        return cast(int, self._wire.call("ZCARD", self._list(listing)))

    def commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event] = (),
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
    ) -> Committed:
        answer = self._commit(writes, events, appends=appends, fence=fence)
        return Committed(cast(int, answer[1]), tuple(EventId(_text(id)) for id in answer[2:]))

    def submit(
        self, idempotency: str | None, digest: str, writes: Sequence[Write], events: Sequence[Event] = ()
    ) -> Submitted:
        answer = self._commit(writes, events, submission=None if idempotency is None else (idempotency, digest))
        if answer[0] == b"repeated":
            return Submitted(False, Key(_text(answer[1])))
        return Submitted(True, writes[0].key)

    def submitted(self, idempotency: str, digest: str) -> Key[Record] | None:
        row = self._wire.call("HMGET", self._submission(idempotency), "digest", "name")
        used, name = cast(Sequence[bytes | None], row)
        if used is None or name is None:
            return None
        if used.decode() != digest:
            raise IdempotencyConflict(idempotency)
        return Key(name.decode())

    def acquire(
        self, scope: str, holder: str, ttl_s: float, *, steal: bool = False, fence: Fence | None = None
    ) -> Lease | None:
        guard, held = (fence.scope, fence.epoch) if fence else ("", "")
        arguments: list[Argument] = [holder, round(ttl_s * 1000), int(steal), held]
        epoch = cast(int, self._wire.script("acquire", [self._lease(scope), self._lease(guard)], arguments))
        if epoch < 0:
            raise Fenced(guard, int(held), -1 - epoch)
        return Lease(scope, holder, epoch, ttl_s) if epoch else None

    def renew(self, lease: Lease) -> bool:
        return bool(self._wire.script("renew", [self._lease(lease.scope)], [lease.epoch, round(lease.ttl_s * 1000)]))

    def release(self, lease: Lease) -> None:
        self._wire.script("renew", [self._lease(lease.scope)], [lease.epoch, 0])

    def events(self, after: EventId, *, limit: int = 1000, wait_s: float = 0.0) -> list[StoredEvent]:
        found = self._read(self._key("log"), after, limit=limit, wait_s=wait_s)
        return [StoredEvent(EventId(id), int(id.partition("-")[0]) / 1000, decode_event(text)) for id, text in found]

    def trim(self, upto: EventId) -> None:
        self._wire.call("XTRIM", self._key("log"), "MINID", upto)

    def append(self, stream: StreamKey, entry: Mapping[str, JSON], *, maxlen: int | None = None) -> EntryId:
        bound = () if maxlen is None else ("MAXLEN", "~", maxlen)
        return EntryId(_text(self._wire.call("XADD", self._stream(stream), *bound, "*", "e", encode_entry(entry))))

    def read(
        self, stream: StreamKey, after: EntryId = OLDEST, *, limit: int = 1000, wait_s: float = 0.0
    ) -> list[tuple[EntryId, Mapping[str, JSON]]]:
        found = self._read(self._stream(stream), after, limit=limit, wait_s=wait_s)
        return [(EntryId(id), decode_entry(text)) for id, text in found]

    def durable(self) -> None:
        # The server's file is sequential: once this write is on disk, so are all before it.
        self._wire.durably("INCR", self._key("durable"))

    def ping(self) -> None:
        self._wire.call("PING")

    def close(self) -> None:
        self._wire.close()

    def _commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event],
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
        submission: tuple[str, str] | None = None,
    ) -> list[object]:
        """The script's answer, "ok" or "repeated"; see lua/commit.lua for the order of names and arguments."""
        scope, epoch = (fence.scope, fence.epoch) if fence else ("", "")
        used, digest = submission or ("", "")
        names = [self._key("version"), self._key("index"), self._key("log"), self._lease(scope)]
        names += [self._submission(used), *(self._record(write.key) for write in writes)]
        names += [self._stream(append.stream) for append in appends]
        arguments: list[Argument] = [epoch, digest, IDEMPOTENCY_S, len(writes), len(events), len(appends)]
        arguments.append(self._list(""))
        for write in writes:
            text = "" if write.value is None else encode_record(write.key, write.value)
            arguments += [write.key, "" if write.expected is None else write.expected, text, _listed(write.value)]
        arguments += [encode_event(event) for event in events]
        for append in appends:
            arguments += ["" if append.maxlen is None else append.maxlen, encode_entry(append.entry)]
        answer = cast(list[object], self._wire.script("commit", names, arguments))
        match answer[0]:
            case b"fenced":
                raise Fenced(scope, int(epoch), cast(int, answer[1]))
            case b"conflict":
                name = _text(answer[1])
                expected = next(write.expected for write in writes if write.key == name and write.expected is not None)
                raise Conflict(name, expected, cast(int, answer[2]))
            case b"mismatch":
                raise IdempotencyConflict(used)
            case _:
                return answer

    def _read(self, key: str, after: str, *, limit: int, wait_s: float) -> list[tuple[str, bytes]]:
        deadline = time.monotonic() + wait_s
        while True:
            left = deadline - time.monotonic()
            block = ("BLOCK", max(1, round(min(left, _BLOCK_S) * 1000))) if left > 0 else ()
            answer = self._wire.call("XREAD", "COUNT", limit, *block, "STREAMS", key, after)
            if answer:
                entries = cast(list[tuple[bytes, Sequence[tuple[bytes, Mapping[bytes, bytes]]]]], answer)[0][1]
                return [(id.decode(), fields[b"e"]) for id, fields in entries]
            if left <= 0:
                return []

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _list(self, listing: str) -> str:
        return f"{self._prefix}list:{listing}"

    def _record(self, key: str) -> str:
        return f"{self._prefix}record:{key}"

    def _stream(self, stream: str) -> str:
        return f"{self._prefix}stream:{stream}"

    def _submission(self, idempotency: str) -> str:
        return f"{self._prefix}submission:{idempotency}"

    def _lease(self, scope: str) -> str:
        return f"{self._prefix}lease:{scope}"


def _versioned(key: Key[R], row: object) -> Versioned[R] | None:
    version, text = cast(Sequence[bytes | None], row)
    if version is None or text is None:
        return None
    return Versioned(key, decode_record(key, text), int(version))


def _listed(value: Record | None) -> str:
    """The record's place, a line feed before it and between it and each of its lists."""
    lists = lists_of(value)
    return "\n".join((place_of(value), *lists)) if value is not None and lists else ""


def _text(value: object) -> str:
    return cast(bytes, value).decode()

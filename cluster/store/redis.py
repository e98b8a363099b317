"""The store on Redis or Valkey (6.2 commands): Lua for what is atomic, streams for logs, WAITAOF before an answer where it exists.

A server without WAITAOF (older than 7.2) must run with appendonly yes and appendfsync always, or writes are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import TypeVar, cast

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

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
    Prefix,
    R,
    StoredEvent,
    StoreError,
    StoreUnavailable,
    StreamKey,
    Submitted,
    Versioned,
    Write,
)
from polygraft.cluster.store.codec import decode_entry, decode_event, decode_record, encode, encode_entry
from polygraft.cluster.store.keys import record_type

TIMEOUT_S = 5.0  # a server that is silent for longer is down
CONNECT_S = 2.0
_BLOCK_S = 2.0  # one blocking read; well below TIMEOUT_S
_PAGE = 500

T = TypeVar("T")


class RedisStore:
    """Everything lies under `prefix`. A blocking read takes a connection of its own out of the pool."""

    def __init__(self, url: str, *, prefix: str = "polygraft:") -> None:
        self._redis = redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=CONNECT_S,
            retry=Retry(NoBackoff(), 0),  # a script sent twice could be applied twice
        )
        self._prefix = prefix
        self._scripts = {name: _Script(self._redis, name) for name in ("commit", "acquire", "renew")}
        self._waits: bool | None = None  # whether the server has WAITAOF; None before the first write

    def get(self, key: Key[R]) -> Versioned[R] | None:
        with _reached():
            found = self._call("HMGET", self._record(key), "version", "text")
        return self._versioned(key, found)

    def scan(self, prefix: Prefix[R], *, after: Key[R] | None = None, limit: int | None = None) -> list[Versioned[R]]:
        records: list[Versioned[R]] = []
        low = b"[" + prefix.encode() if after is None or after < prefix else b"(" + after.encode()
        while limit is None or len(records) < limit:
            page = _PAGE if limit is None else min(_PAGE, limit - len(records))
            with _reached():
                names = self._call("ZRANGEBYLEX", self._key("index"), low, b"(" + prefix.encode() + b"\xff", "LIMIT", 0, page)
                found = [Key[R](name.decode()) for name in cast(list[bytes], names)]
                pipeline = self._redis.pipeline(transaction=False)
                for key in found:
                    pipeline.execute_command("HMGET", self._record(key), "version", "text")
                rows = pipeline.execute()
            records += [one for key, row in zip(found, rows, strict=True) if (one := self._versioned(key, row))]
            if len(found) < page:
                break
            low = b"(" + found[-1].encode()
        return records

    def commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event] = (),
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
    ) -> Committed:
        answer = self._commit(writes, events, appends=appends, fence=fence)
        return Committed(_integer(answer[1]), tuple(EventId(_text(id)) for id in answer[2:]))

    def submit(
        self, idempotency: str | None, digest: str, writes: Sequence[Write], events: Sequence[Event] = ()
    ) -> Submitted:
        answer = self._commit(writes, events, submission=None if idempotency is None else (idempotency, digest))
        if answer[0] == b"repeated":
            return Submitted(False, Key(_text(answer[1])))
        return Submitted(True, writes[0].key)

    def acquire(self, scope: str, holder: str, ttl_s: float, *, steal: bool = False) -> Lease | None:
        epoch = self._write("acquire", [self._lease(scope)], [holder, round(ttl_s * 1000), int(steal)])
        return Lease(scope, holder, _integer(epoch), ttl_s) if epoch else None

    def renew(self, lease: Lease) -> bool:
        with _reached():
            return bool(self._scripts["renew"]([self._lease(lease.scope)], [lease.epoch, round(lease.ttl_s * 1000)]))

    def release(self, lease: Lease) -> None:
        with _reached():
            self._scripts["renew"]([self._lease(lease.scope)], [lease.epoch, 0])

    def events(self, after: EventId, *, limit: int = 1000, wait_s: float = 0.0) -> list[StoredEvent]:
        found = self._read(self._key("log"), after, limit, wait_s)
        return [StoredEvent(EventId(id), int(id.partition("-")[0]) / 1000, decode_event(text)) for id, text in found]

    def trim(self, upto: EventId) -> None:
        with _reached():
            self._call("XTRIM", self._key("log"), "MINID", upto)

    def append(self, stream: StreamKey, entry: Mapping[str, JSON], *, maxlen: int | None = None) -> EntryId:
        bound = () if maxlen is None else ("MAXLEN", "~", maxlen)
        with _reached():
            return EntryId(_text(self._call("XADD", self._stream(stream), *bound, "*", "e", encode_entry(entry))))

    def read(
        self, stream: StreamKey, after: EntryId = OLDEST, *, limit: int = 1000, wait_s: float = 0.0
    ) -> list[tuple[EntryId, Mapping[str, JSON]]]:
        found = self._read(self._stream(stream), after, limit, wait_s)
        return [(EntryId(id), decode_entry(text)) for id, text in found]

    def durable(self) -> None:
        # WAITAOF waits for the writes of its own connection; the file is sequential, so this one is behind all others.
        with _reached():
            self._on_disk(lambda pipeline: pipeline.execute_command("INCR", self._key("durable")))

    def ping(self) -> None:
        with _reached():
            self._call("PING")

    def close(self) -> None:
        self._redis.close()

    def _commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event],
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
        submission: tuple[str, str] | None = None,
    ) -> list[object]:
        """The script's answer, "ok" or "repeated"."""
        lease = self._lease(fence.scope if fence else "")
        names = [self._key("version"), self._key("index"), self._key("log"), lease]
        names.append(self._key(f"submission:{submission[0] if submission else ''}"))
        names += [self._record(write.key) for write in writes] + [self._stream(append.stream) for append in appends]
        arguments: list[str | int] = [fence.epoch if fence else "", submission[1] if submission else "", IDEMPOTENCY_S]
        arguments += [len(writes), len(events), len(appends)]
        for write in writes:
            record_type(write.key)
            text = "" if write.value is None else encode(write.value)
            arguments += [write.key, "" if write.expected is None else write.expected, text]
        arguments += [encode(event) for event in events]
        for append in appends:
            arguments += ["" if append.maxlen is None else append.maxlen, encode_entry(append.entry)]
        answer = cast(list[object], self._write("commit", names, arguments))
        match answer[0]:
            case b"fenced":
                assert fence is not None
                raise Fenced(fence.scope, fence.epoch, _integer(answer[1]))
            case b"conflict":
                name = _text(answer[1])
                expected = next(write.expected for write in writes if write.key == name and write.expected is not None)
                raise Conflict(name, expected, _integer(answer[2]))
            case b"mismatch":
                assert submission is not None
                raise IdempotencyConflict(submission[0])
            case _:
                return answer

    def _write(self, script: str, names: Sequence[str], arguments: Sequence[str | int]) -> object:
        """Run a script and return its answer once its writes are on disk."""
        with _reached():
            return self._on_disk(lambda pipeline: self._scripts[script].queue(pipeline, names, arguments))

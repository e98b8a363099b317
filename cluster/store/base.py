"""The store: versioned records, one control log, small streams, leases. The contract every back end keeps.

- Values are frozen; what `get` returned never changes under its reader. All methods may be called from any thread.
- `commit` and `submit` are atomic: all writes, events and appends, or none. Versions grow over the whole store and
  are never reused, so an expected version also tells a recreated record from the deleted one; compare them for equality
  only.
- Ids of events and stream entries are "<milliseconds>-<sequence>" and strictly grow within their stream.
- A returned `commit` or `submit` is on disk (the memory twin: in memory). `append` is not until `durable` returns.
- StoreUnavailable from `commit` or `submit` means the outcome is unknown, unless it is WriteRefused: read before
  writing again. A back end reconnects by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NewType, Protocol, TypeVar

from polygraft.cluster.events import Event
from polygraft.cluster.model import EventId, Record

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]
StreamKey = NewType("StreamKey", str)
EntryId = NewType("EntryId", str)

OLDEST = EntryId("0-0")  # before every entry of a stream
IDEMPOTENCY_S = 86400  # how long a submission is remembered


class Key(str, Generic[R_co]):
    """Where a record lies; built in store/keys.py. The parameter is the record's type."""

    __slots__ = ()


class Prefix(str, Generic[R_co]):
    """What the keys of a family of records start with; built in store/keys.py."""

    __slots__ = ()


class Listing(str, Generic[R_co]):
    """Records of one kind in the order of their time; built in store/keys.py."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Versioned(Generic[R_co]):
    key: Key[R_co]
    value: R_co
    version: int


@dataclass(frozen=True, slots=True)
class Write:
    """Put `value` (None: delete). `expected`: the version found before; 0 = none there, None = no matter."""

    key: Key[Record]
    value: Record | None
    expected: int | None


@dataclass(frozen=True, slots=True)
class Append:
    """An entry for a stream, which keeps about the newest `maxlen`. Non-finite numbers become null."""

    stream: StreamKey
    entry: Mapping[str, JSON]
    maxlen: int | None = None


@dataclass(frozen=True, slots=True)
class Fence:
    """A writer's claim: only while `epoch` is the newest of `scope` may it write."""

    scope: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write in `scope`, until it is not renewed for `ttl_s` seconds or stolen."""

    scope: str
    holder: str
    epoch: int
    ttl_s: float

    @property
    def fence(self) -> Fence:
        return Fence(self.scope, self.epoch)


@dataclass(frozen=True, slots=True)
class Committed:
    """The version that all written records have now, and the ids of the events."""

    version: int
    events: tuple[EventId, ...]


@dataclass(frozen=True, slots=True)
class Submitted:
    """`created` is False when the idempotency key was used before; `key` is then that first submission's."""

    created: bool
    key: Key[Record]


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """`at` is the store's clock; the writer's is `event.at`."""

    id: EventId
    at: float
    event: Event


class StoreError(Exception):
    """A write the store refused, or a store that does not answer."""


class Conflict(StoreError):
    """A record is not at the expected version; read it again and decide again."""

    def __init__(self, key: str, expected: int, found: int, message: str | None = None) -> None:
        super().__init__(message or f"{key}: expected version {expected or 'none'}, found {found or 'none'}")
        self.key = key
        self.expected = expected
        self.found = found


class IdempotencyConflict(Conflict):
    """An idempotency key came back with another request."""

    def __init__(self, key: str) -> None:
        super().__init__(key, 0, 0, f"idempotency key {key!r} was used for a different request; use a new one")


class Fenced(StoreError):
    """Another writer holds the scope now; stop writing."""

    def __init__(self, scope: str, epoch: int, current: int) -> None:
        super().__init__(f"{scope}: epoch {epoch} is fenced out, the newest is {current}")
        self.scope = scope
        self.epoch = epoch
        self.current = current


class StoreUnavailable(StoreError):
    """The store does not answer, or cannot promise to keep what it is told."""


class WriteRefused(StoreUnavailable):
    """The store takes no writes at present, for want of room on its disk or in its memory. This one did not happen, and
    may be sent again; reading goes on."""


class Store(Protocol):
    """See the module's docstring for what holds for all methods."""

    def get(self, key: Key[R]) -> Versioned[R] | None: ...

    def scan(self, prefix: Prefix[R], *, after: Key[R] | None = None, limit: int | None = None) -> list[Versioned[R]]:
        """Records whose keys start with `prefix`, in the order of their keys, those greater than `after`."""
        ...

    def newest(self, listing: Listing[R], *, before: R | None = None, limit: int | None = None) -> list[Versioned[R]]:
        """The records of the list, the newest first, those older than `before`; it takes as long as there are that
        many, whatever else the store holds."""
        ...

    def count(self, listing: Listing[R]) -> int:
        """How many records the list has."""
        ...

    def commit(
        self,
        writes: Sequence[Write],
        events: Sequence[Event] = (),
        *,
        appends: Sequence[Append] = (),
        fence: Fence | None = None,
    ) -> Committed:
        """Write records, log events and append to streams, all or nothing. Raises Fenced, Conflict."""
        ...

    def submit(
        self, idempotency: str | None, digest: str, writes: Sequence[Write], events: Sequence[Event] = ()
    ) -> Submitted:
        """`commit` that happens once per idempotency key (kept for IDEMPOTENCY_S); the result is the first write's key.

        `idempotency` includes the tenant. Raises IdempotencyConflict if it came with another `digest` before.
        """
        ...

    def submitted(self, idempotency: str, digest: str) -> Key[Record] | None:
        """What `submit` would find: the first submission's key. Raises IdempotencyConflict as it does."""
        ...

    def acquire(
        self, scope: str, holder: str, ttl_s: float, *, steal: bool = False, fence: Fence | None = None
    ) -> Lease | None:
        """A lease with a new epoch; None while another holder's is running and `steal` is not given. Raises Fenced."""
        ...

    def renew(self, lease: Lease) -> bool:
        """Start the lease's time again; False if it is no longer the newest. One that ran out unnoticed is renewed."""
        ...

    def release(self, lease: Lease) -> None:
        """Let the next one acquire at once; nothing if it is no longer the newest. Its fence holds until then."""
        ...

    def events(self, after: EventId, *, limit: int = 1000, wait_s: float = 0.0) -> list[StoredEvent]:
        """The oldest `limit` events after `after`; if there are none, wait up to `wait_s` seconds for one."""
        ...

    def trim(self, upto: EventId) -> None:
        """Forget the events before `upto`."""
        ...

    def append(self, stream: StreamKey, entry: Mapping[str, JSON], *, maxlen: int | None = None) -> EntryId:
        """One `Append` without a commit."""
        ...

    def read(
        self, stream: StreamKey, after: EntryId = OLDEST, *, limit: int = 1000, wait_s: float = 0.0
    ) -> list[tuple[EntryId, Mapping[str, JSON]]]:
        """The oldest `limit` entries after `after`; if there are none, wait up to `wait_s` seconds for one."""
        ...

    def durable(self) -> None:
        """Return once everything written so far is on disk."""
        ...

    def ping(self) -> None:
        """Raise StoreUnavailable unless the store answers."""
        ...

    def close(self) -> None: ...

"""What an ingress knows of the service's backbones: it follows the store, so that one that is added later is there
without a restart, and one that was removed is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from threading import Lock

from starlette.concurrency import run_in_threadpool

from polygraft.cluster.backbones import advance_backbone, backbones, is_used
from polygraft.cluster.events import BackboneAsked
from polygraft.cluster.model import Backbone, Graft, GraftId, TenantId
from polygraft.cluster.policy.loading import is_wanted
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store.base import Store, StoreError
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.adoption import Adoption
from polygraft.serving.gateway import Gateway

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0
_SAID_S = 60.0  # how often the store is told at most that a backbone is asked
_SAID_SHARE = 0.2  # of the time after which it is unloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBackbone:
    """A backbone as requests need it: its record, tokens, sites and files, the way to its replicas, and the reader of
    grafts made for it. `max_context` are the tokens of a prompt and its answer."""

    record: Backbone
    tokeniser: Tokeniser
    shape: ModelShape
    files: BackboneFiles
    gateway: Gateway
    adoption: Adoption
    max_context: int

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    @property
    def quantised(self) -> bool:
        return self.record.quantise is not None


class Backbones:
    """The backbones by name, first the service's own, which is the default. `opened` makes what is known of one from
    its record; what it raises keeps that backbone unknown, and no other. A gateway whose backbone was removed ends with
    its last stream. `look`, `named`, `of` and `asked` may be called from any thread."""

    def __init__(
        self,
        store: Store,
        opened: Callable[[Backbone], KnownBackbone],
        *,
        default: str,
        unload_s: float = 0.0,
        idle_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._opened = opened
        self.own = default
        self._unload_s, self._idle_s = unload_s, idle_s
        self._clock = clock
        self._known: Mapping[str, KnownBackbone] = {}
        self._lock = Lock()
        self._said: dict[str, float] = {}
        self._started: dict[Gateway, KnownBackbone] = {}
        self._answers: Counter[Gateway] = Counter()
        self._starting = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[KnownBackbone]:
        return iter(self._known.values())

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._known)

    @property
    def default(self) -> KnownBackbone | None:
        """The one that the settings name; None where it cannot be had."""
        return self._known.get(self.own)

    def named(self, name: str) -> KnownBackbone | None:
        """The backbone of that name; one that was added a moment ago, too."""
        if name not in self._known:
            self.look()
        return self._known.get(name)

    def of(self, graft: Graft) -> KnownBackbone | None:
        """The one that the graft has grown on."""
        found = self._grown_on(graft.backbone_fingerprint)
        if found is None:
            self.look()
            found = self._grown_on(graft.backbone_fingerprint)
        return found

    def look(self) -> None:
        """Know what the store has now."""
        with self._lock:
            records = sorted(backbones(self._store), key=lambda one: (one.name != self.own, one.name))
            found = ((record.name, self._seen(record)) for record in records)
            self._known = {name: known for name, known in found if known is not None}

    def wanted(self, known: KnownBackbone) -> bool:
        """Whether replicas hold it, or will; where the last of them goes after `idle_s` seconds, whether it was asked
        since."""
        record, now = known.record, self._clock()
        if self._idle_s is not None:
            return is_wanted(record, now=now, unload_s=min(self._idle_s, self._unload_s or self._idle_s))
        return record.loaded or is_wanted(record, now=now, unload_s=self._unload_s)

    def asked(self, known: KnownBackbone) -> None:
        """Tell the store that it is asked, so that it is loaded and stays so; where that was said a moment ago, or the
        store takes no writes, nothing is said."""
        now = self._clock()
        since = max(known.record.asked_at, self._said.get(known.name, 0.0))
        often = min(_SAID_S, self._unload_s * _SAID_SHARE) if self._unload_s else _SAID_S
        if not known.record.asked_at:  # it is not loaded, whatever was said before
            often = _LOOK_S
        if now - since < often:
            return
        self._said[known.name] = now
        with suppress(StoreError, IllegalTransition):
            advance_backbone(self._store, BackboneAsked(backbone=known.name, at=now))

    async def start(self) -> None:
        """Begin to follow the store, on the event loop that the gateways live on."""
        await self._follow_once()
        self._following = asyncio.get_running_loop().create_task(self._follow())

    @asynccontextmanager
    async def answering(self, known: KnownBackbone) -> AsyncIterator[Gateway]:
        """The backbone's gateway, for an answer that is being generated until the block ends."""
        self._answers[known.gateway] += 1
        try:
            yield await self.started(known)
        finally:
            self._answers[known.gateway] -= 1

    def busy(self, known: KnownBackbone) -> bool:
        """Whether an answer is being generated with it, or waits for a replica."""
        return self._answers[known.gateway] > 0

    def uses(self, tenant: TenantId, graft: GraftId) -> bool:
        """Whether an answer of the tenant's is being generated with the graft, here or by another ingress; what one of
        those began within the last moment is not known yet. May be called from any thread."""
        here = any((tenant, graft) in gateway.used for gateway in list(self._started))
        return here or any(is_used(self._store, name, tenant, graft) for name in self.names)

    async def started(self, known: KnownBackbone) -> Gateway:
        """The backbone's gateway, which follows its replicas from now on."""
        async with self._starting:
            if known.gateway not in self._started:
                await known.gateway.start()
                self._started[known.gateway] = known
        return known.gateway

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        for known in list(self._started.values()):
            await self._end(known)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._follow_once()
            except StoreError as error:
                _LOG.warning("the store does not say which backbones there are: %s", error)

    async def _follow_once(self) -> None:
        await run_in_threadpool(self.look)
        present = {known.gateway: known for known in self}
        for gateway, known in list(self._started.items()):
            if gateway not in present and not self.busy(known):
                await self._end(known)
        for known in present.values():
            await self.started(known)
            if self.busy(known):
                await run_in_threadpool(self.asked, known)

    async def _end(self, known: KnownBackbone) -> None:
        del self._started[known.gateway], self._answers[known.gateway]
        await known.gateway.close()
        await known.adoption.close()

    def _grown_on(self, fingerprint: str) -> KnownBackbone | None:
        return next((known for known in self if known.fingerprint == fingerprint), None)

    def _seen(self, record: Backbone) -> KnownBackbone | None:
        before = self._known.get(record.name)
        if before is not None and _lies(before.record) == _lies(record):
            return replace(before, record=record)
        try:
            return self._opened(record)
        except Exception:
            _LOG.exception("the backbone %s cannot be served", record.name)
            return None


def _lies(record: Backbone) -> tuple[object, ...]:
    """What a backbone's gateway, tokens and sites depend on."""
    return record.folder, record.dtype, record.quantise, record.fingerprint, record.added_at, record.sizes

"""What an ingress and the store tell each other of a backbone's replicas: which there are, and how many are wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from polygraft.cluster.backbones import DEMANDS_KEPT
from polygraft.cluster.model import GraftId, Replica, ReplicaId, TenantId
from polygraft.cluster.policy.scaling import Demand
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, OLDEST, EntryId, Store, StoreError
from polygraft.serving.gateway import Gateway, Link

_LOG = logging.getLogger(__name__)
_LOOK_S = 2.0  # how long a change that nobody told of may go unnoticed
_TELL_S = 0.25  # how often a demand that changes is said
_REPEAT_S = 1.0  # how often one that does not
T = TypeVar("T")
Entry = dict[str, JSON]


class StoreFleet:
    """The replicas of `backbone` that the store has open, each by what `connect` makes of its record. While the store
    does not answer, they are those that it had."""

    def __init__(self, store: Store, backbone: str, *, connect: Callable[[Replica], Link]) -> None:
        self._store, self._backbone, self._connect = store, backbone, connect
        self._links: dict[ReplicaId, Link] = {}
        self._after: EntryId = OLDEST
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="fleet")  # one waits for changes, one tells

    async def keep(self, gateway: Gateway) -> None:
        """Until it is cancelled."""
        try:
            await asyncio.gather(self._follow(gateway), self._tell(gateway))
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, gateway: Gateway) -> None:
        while True:
            try:
                found = await self._in_thread(lambda: self._store.scan(keys.REPLICAS))
                open_ = {one.value.id: one.value for one in found if one.value.backbone == self._backbone}
                self._links = {id: self._links.get(id) or self._connect(replica) for id, replica in open_.items()}
                gateway.follow(self._links)
                await self._in_thread(self._wait)
            except Exception as error:  # whatever it is, the next look may succeed
                known = isinstance(error, StoreError)
                _LOG.warning("replicas of %s are those there were: %s", self._backbone, error, exc_info=not known)
                await asyncio.sleep(_LOOK_S)

    def _wait(self) -> None:
        """Until a replica has come or gone."""
        entries = self._store.read(keys.replica_changes(self._backbone), self._after, wait_s=_LOOK_S)
        self._after = entries[-1][0] if entries else self._after

    async def _tell(self, gateway: Gateway) -> None:
        """What is wanted, when it changes, and again while it is something."""
        said, at = _entry(gateway.name, Demand(), ()), float("-inf")
        now = asyncio.get_running_loop().time
        while True:
            wanted = gateway.demand
            entry = _entry(gateway.name, wanted, gateway.used)
            if entry != said or (wanted.total and now() - at >= _REPEAT_S):
                try:
                    await self._in_thread(partial(self._say, entry))
                    said, at = entry, now()
                except StoreError as error:
                    _LOG.warning("nobody hears what is wanted of %s: %s", self._backbone, error)
            await asyncio.sleep(_TELL_S)

    def _say(self, entry: Entry) -> None:
        self._store.append(keys.demand(self._backbone), entry, maxlen=DEMANDS_KEPT)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _entry(gateway: str, demand: Demand, used: Collection[tuple[TenantId, GraftId]]) -> Entry:
    """What the store is told (cluster/backbones.py, cluster/actors/scaler.py)."""
    grafts: list[JSON] = [list(one) for one in sorted(used)]
    return {"ingress": gateway, "streams": demand.streams, "waiting": demand.waiting, "grafts": grafts}

"""Ray Serve's autoscaling policy of a backbone's engine: what ingresses say in the store, by cluster/policy/scaling.py.

Serve's controller calls it ten times a second, in its own loop, so it only reads what a thread of its own has heard.
Whatever goes wrong, and while nothing has been heard, there are as many replicas as there were: an exception would
spoil the round of all applications.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from threading import Lock, Thread
from typing import Protocol

from polygraft.cluster.model import Occupancy, Replica
from polygraft.cluster.policy.scaling import Demand, Lately, Scaling, looked, target
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, OLDEST, EntryId, Store, StoreError
from polygraft.cluster.store.connect import connect

_LOG = logging.getLogger(__name__)
_SILENT_S = 5.0  # an ingress that has said nothing for so long wants nothing; a store, and nothing is known
_WAIT_S = 1.0
_SEE_S = 2.0
_LOG_S = 10.0


class Context(Protocol):
    """What is read of Serve's AutoscalingContext."""

    target_num_replicas: int


class Scaler:
    """Built by Serve from keyword arguments that are JSON. What it has seen may be lost at any time."""

    def __init__(
        self,
        *,
        store_url: str,
        backbone: str,
        share: float,
        scaling: Mapping[str, float | None],
        bytes_: int | None = None,
    ) -> None:
        """`scaling` are the fields of Scaling; without a `most` there are as many replicas as find `bytes_` of a device
        free, or where that is not known `share` of it."""
        self._backbone = backbone
        self._share, self._bytes = share, bytes_
        self._given = scaling["most"] is not None
        self._scaling = Scaling(**{**scaling, "most": scaling["most"] or scaling["least"]})  # type: ignore[arg-type]
        self._lately: Lately | None = None
        self._lock = Lock()
        self._said: dict[str, tuple[float, Demand]] = {}
        self._heard_at = float("-inf")
        self._logged_at = float("-inf")
        # Serve drops a policy without a word; its thread ends when it is gone.
        Thread(target=_listen, args=(weakref.ref(self), store_url, backbone), name="scaler", daemon=True).start()

    def __call__(self, context: Context) -> tuple[int, dict[str, object]]:
        """The number of replicas there should be, and no state for Serve to keep."""
        present = context.target_num_replicas
        try:
            return self.target(present, time.monotonic()), {}
        except Exception:
            if time.monotonic() - self._logged_at > _LOG_S:
                self._logged_at = time.monotonic()
                _LOG.exception("the backbone %s keeps its %d replicas", self._backbone, present)
            return present, {}

    def target(self, present: int, now: float) -> int:
        with self._lock:
            scaling = self._scaling
            known = now - self._heard_at < _SILENT_S
            demand = sum((one for at, one in self._said.values() if now - at < _SILENT_S), Demand())
        if not known:
            self._lately = None
            return present
        lately = looked(self._lately or Lately(now, now), demand, scaling, now)
        self._lately = lately
        return target(lately, demand, scaling, present, now)

    def see(self, replicas: Iterable[Replica], devices: Iterable[Occupancy]) -> None:
        """What there is now."""
        if self._given:
            return
        own = sum(replica.backbone == self._backbone for replica in replicas)
        more = sum(
            int(one.free // (self._bytes or self._share * one.device.bytes)) for one in devices if one.device.bytes
        )
        with self._lock:
            self._scaling = replace(self._scaling, most=max(self._scaling.least, own + more))

    def hear(self, entries: list[Mapping[str, JSON]], now: float) -> None:
        """What ingresses said since the last call, which may be nothing."""
        with self._lock:
            self._heard_at = now
            self._said = {ingress: said for ingress, said in self._said.items() if now - said[0] < _SILENT_S}
            for entry in entries:
                match entry:
                    case {"ingress": str(ingress), "streams": int(streams), "waiting": int(waiting)}:
                        self._said[ingress] = now, Demand(streams, waiting)
                    case _:
                        _LOG.warning("no demand: %s", entry)


def _listen(of: weakref.ref[Scaler], store_url: str, backbone: str) -> None:
    """Tell the scaler what is said from now on: whoever wants something says so again."""
    store: Store | None = None
    after: EntryId | None = None
    seen_at = float("-inf")
    while of() is not None:
        try:
            store = store or connect(store_url)
            if after is None:
                after = _last(store, backbone)
            entries = store.read(keys.demand(backbone), after, wait_s=_WAIT_S)
            after = entries[-1][0] if entries else after
            if time.monotonic() - seen_at > _SEE_S:
                seen_at = time.monotonic()
                replicas, devices = store.scan(keys.REPLICAS), store.scan(keys.DEVICES)
                if (scaler := of()) is not None:
                    scaler.see([one.value for one in replicas], [one.value for one in devices])
                del scaler
        except StoreError as error:
            _LOG.warning("the demand for %s is unknown: %s", backbone, error)
            time.sleep(_WAIT_S)
            continue
        if (scaler := of()) is not None:
            scaler.hear([entry for _, entry in entries], time.monotonic())
        del scaler
    if store is not None:
        store.close()


def _last(store: Store, backbone: str) -> EntryId:
    after = OLDEST
    while entries := store.read(keys.demand(backbone), after):
        after = entries[-1][0]
    return after

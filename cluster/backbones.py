"""The backbones that a service has: added, asked, loaded, unloaded and removed, each with its event in one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polygraft.cluster.events import BackboneAdded, BackboneEvent
from polygraft.cluster.evolve import backbone_after
from polygraft.cluster.model import Backbone, GraftId, TenantId
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Conflict, EntryId, Fence, Store, Write
from polygraft.cluster.validation import shown

TRIES = 20  # other writers of one record: ingresses that are asked, and the controller
DEMANDS_KEPT = 256  # entries of what ingresses want of a backbone
_LATELY_S = 3.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class BadBackboneName(ValueError):
    """A name that no backbone can have."""


class Taken(Exception):
    """The name, or the model, is there already under another one."""


def check_backbone_name(name: str) -> str:
    """The name, if a backbone can have it. Raises BadBackboneName."""
    if _NAME.fullmatch(name) is None:
        raise BadBackboneName(
            f"name: {shown(name)} is not one for a backbone; use up to 64 letters, digits, dots, dashes and "
            "underscores, a letter or digit first"
        )
    return name


def backbones(store: Store) -> Sequence[Backbone]:
    """By name."""
    return [found.value for found in store.scan(keys.BACKBONES)]


def add_backbone(store: Store, record: Backbone) -> Backbone:
    """The record, written; one that says the same is left as it is and returned. Raises Taken for a name that another
    model or a graft has, and for a model that has another name."""
    for other in backbones(store):
        if other.name == record.name and _same(other, record):
            return other
        if other.name == record.name:
            raise Taken(f"name: {shown(record.name)} is another backbone, {other.folder}; remove it first")
        if other.fingerprint == record.fingerprint:
            raise Taken(f"path: {record.folder} is the model of the backbone {other.name}, whose name means it already")
    if any(alias.value.name == record.name for alias in store.scan(keys.ALIASES)):
        raise Taken(f"name: {shown(record.name)} is that of a graft; choose another")
    try:
        store.commit([Write(keys.backbone(record.name), record, 0)], [BackboneAdded(record=record, at=record.added_at)])
    except Conflict:
        raise Taken(f"name: {shown(record.name)} was just added by somebody else") from None
    return record


def put_backbone(store: Store, record: Backbone, *, at: float) -> Backbone:
    """The record of a service that begins, whatever was under its name before: what it was asked and whether it is
    loaded stay as they are where it is the same model."""
    found = store.get(keys.backbone(record.name))
    if found is not None and _same(found.value, record):
        asked_at = max(found.value.asked_at, record.asked_at)
        record = replace(found.value, folder=record.folder, asked_at=asked_at, sizes=record.sizes)
    store.commit([Write(keys.backbone(record.name), record, None)], [BackboneAdded(record=record, at=at)])
    return record


def advance_backbone(store: Store, event: BackboneEvent, *, fence: Fence | None = None) -> None:
    """Write the event and what it makes of the record. Raises IllegalTransition where there is no such backbone, and
    Fenced."""
    for attempt in range(TRIES):
        found = store.get(keys.backbone(event.backbone))
        if found is None:
            raise IllegalTransition(event.backbone, "absent", type(event).__name__)
        write = Write(found.key, backbone_after(found.value, event), found.version)
        try:
            store.commit([write], [event], fence=fence)
            return
        except Conflict:
            if attempt == TRIES - 1:
                raise


def is_answering(store: Store, backbone: str) -> bool:
    """Whether an ingress, whichever, has requests for the backbone: each says so every second while it has some."""
    return any(entry["streams"] or entry["waiting"] for entry in _said_lately(store, backbone))


def is_used(store: Store, backbone: str, tenant: TenantId, graft: GraftId) -> bool:
    """Whether an ingress, whichever, generates an answer of the tenant's with the graft, by what each says."""
    return any([tenant, graft] in entry.get("grafts", ()) for entry in _said_lately(store, backbone))


def _said_lately(store: Store, backbone: str) -> Sequence[Mapping[str, Any]]:
    """The newest entry of each ingress that said something a moment ago."""
    stream = keys.demand(backbone)
    nothing: dict[str, JSON] = {"ingress": "", "streams": 0, "waiting": 0}
    now = _milliseconds(store.append(stream, nothing, maxlen=DEMANDS_KEPT))  # by the clock that stamps them all
    said = {entry["ingress"]: (id_, entry) for id_, entry in store.read(stream)}
    return [entry for id_, entry in said.values() if now - _milliseconds(id_) < _LATELY_S * 1000]


def _milliseconds(id_: EntryId) -> int:
    return int(id_.partition("-")[0])


def _same(one: Backbone, other: Backbone) -> bool:
    """Whether both are one model, loaded in one way."""
    return (one.fingerprint, one.dtype, one.quantise) == (other.fingerprint, other.dtype, other.quantise)

"""What happens to a published graft later: its name moves to another version and back, and a version is deleted.

A number is never given out twice: the alias remembers the highest, also when no version is left.
"""

from __future__ import annotations

from dataclasses import replace

from polygraft.cluster.events import AliasMoved, GraftDeleted
from polygraft.cluster.model import Alias, Graft, TenantId
from polygraft.cluster.publish import UnknownModel, retried
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Versioned, Write


class InUse(Exception):
    """A version that cannot be deleted now; the message says what needs it."""


class NoVersionBefore(Exception):
    """There is no version that the name could go back to."""


def promote(store: Store, tenant: TenantId, name: str, version: int, *, at: float) -> Graft:
    """Let the name mean this version; requests in flight keep the one that they began with. Raises UnknownModel."""

    def once() -> Graft:
        alias = _alias(store, tenant, name)
        graft = store.get(keys.graft(tenant, name, version))
        if graft is None:
            raise UnknownModel(f"{name}@{version}")
        if alias.value.version != version:
            _move(store, alias, graft, at)
        return graft.value

    return retried(once)


def roll_back(store: Store, tenant: TenantId, name: str, *, at: float) -> Graft:
    """Let the name mean the newest version before the one that it means. Raises UnknownModel, NoVersionBefore."""

    def once() -> Graft:
        alias = _alias(store, tenant, name)
        before = [one for one in versions(store, tenant, name) if one.value.version < alias.value.version]
        if not before:
            raise NoVersionBefore(f"{name!r} has no version before {name}@{alias.value.version}")
        _move(store, alias, before[-1], at)
        return before[-1].value

    return retried(once)


def delete(store: Store, tenant: TenantId, name: str, version: int, *, at: float) -> Graft:
    """Forget the version; its folder is the caller's to remove. Raises UnknownModel, and InUse where the name means
    this version and there are others that it could mean."""

    def once() -> Graft:
        alias = _alias(store, tenant, name)
        graft = store.get(keys.graft(tenant, name, version))
        if graft is None:
            raise UnknownModel(f"{name}@{version}")
        meant = alias.value.version == version
        if meant and len(versions(store, tenant, name)) > 1:
            raise InUse(f"{name!r} means {name}@{version}; promote another version before you delete this one")
        left = replace(alias.value, version=0) if meant else alias.value
        gone = GraftDeleted(tenant=tenant, name=name, version=version, graft=graft.value.id, at=at)
        store.commit([Write(graft.key, None, graft.version), Write(alias.key, left, alias.version)], [gone])
        return graft.value

    return retried(once)


def versions(store: Store, tenant: TenantId, name: str) -> list[Versioned[Graft]]:
    """The versions that there are of a name, from the first on."""
    found = [one for one in store.scan(keys.grafts(tenant)) if one.value.name == name]
    return sorted(found, key=lambda one: one.value.version)


def _alias(store: Store, tenant: TenantId, name: str) -> Versioned[Alias]:
    found = store.get(keys.alias(tenant, name))
    if found is None:
        raise UnknownModel(name)
    return found


def _move(store: Store, alias: Versioned[Alias], graft: Versioned[Graft], at: float) -> None:
    """The graft is written again as it is, so that a deletion meanwhile is a conflict."""
    name, version = alias.value.name, graft.value.version
    moved = AliasMoved(tenant=alias.value.tenant, name=name, version=version, at=at)
    store.commit(
        [
            Write(alias.key, replace(alias.value, version=version), alias.version),
            Write(graft.key, graft.value, graft.version),
        ],
        [moved],
    )

"""How a trained graft gets its name, in one commit with its job's success, and how a model's name is looked up."""

from __future__ import annotations

import re
from collections.abc import Callable

from polygraft.cluster.events import AliasMoved, Event, GraftPublished, JobSucceeded
from polygraft.cluster.evolve import job_after
from polygraft.cluster.model import Alias, Graft, GraftId, Job, JobId, TenantId
from polygraft.cluster.states import IllegalTransition, JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, Fence, Store, Versioned, Write
from polygraft.cluster.validation import shown

TRIES = 50  # jobs of one tenant that publish under one name at the same moment
_MODEL = re.compile(r"([a-z0-9-]{1,64})(?:@([1-9][0-9]{0,8}))?", re.ASCII)


class UnknownModel(LookupError):
    """No such model for this tenant; another tenant's looks the same."""

    def __init__(self, model: str) -> None:
        super().__init__(f"model {shown(model)} does not exist; GET /v1/models lists yours")
        self.model = model


class BadName(ValueError):
    """A name that no graft can have."""


def publish(  # noqa: PLR0913
    store: Store,
    job: JobId,
    *,
    graft: GraftId,
    method: str,
    backbone_fingerprint: str,
    parameters: int,
    bytes: int,
    context_length: int,
    at: float,
    fence: Fence | None = None,
) -> Graft:
    """The job's graft, whose folder is in place, as `name@n`; publishing it again returns the same version.

    The first version of a name makes the alias; a later one moves it only if the job asks (`promote`). Steps, tokens
    and losses are those last recorded. Raises Fenced, and IllegalTransition if the job ended otherwise meanwhile.
    """

    def once() -> Graft:
        found = store.get(keys.job(job))
        if found is None:
            raise IllegalTransition(job, "absent", JobState.SUCCEEDED)
        if found.value.state is JobState.SUCCEEDED and found.value.graft == graft:
            assert found.value.model is not None
            return _version(store, found.value.tenant, found.value.model)
        alias = store.get(keys.alias(found.value.tenant, found.value.name))
        published = Graft(
            tenant=found.value.tenant,
            name=found.value.name,
            version=_next(alias),
            id=graft,
            method=method,
            backbone_fingerprint=backbone_fingerprint,
            parameters=parameters,
            bytes=bytes,
            context_length=context_length,
            created_at=at,
            job=job,
        )
        _commit(store, published, found, alias, fence)
        return published

    return retried(once)


def adopt(  # noqa: PLR0913
    store: Store,
    tenant: TenantId,
    name: str,
    *,
    graft: GraftId,
    method: str,
    backbone_fingerprint: str,
    parameters: int,
    bytes: int,
    context_length: int,
    at: float,
    promote: bool = False,
) -> Graft:
    """A graft that no job trained, whose folder is in place, as `name@n`, each time as another version.

    Raises BadName.
    """
    check_name(name)

    def once() -> Graft:
        alias = store.get(keys.alias(tenant, name))
        found = Graft(
            tenant=tenant,
            name=name,
            version=_next(alias),
            id=graft,
            method=method,
            backbone_fingerprint=backbone_fingerprint,
            parameters=parameters,
            bytes=bytes,
            context_length=context_length,
            created_at=at,
        )
        store.commit(*_named(found, alias, promote))
        return found

    return retried(once)


def check_name(name: str) -> str:
    """The name, if a graft can have it. Raises BadName."""
    if _MODEL.fullmatch(name) is None or "@" in name:
        raise BadName(f"name: {shown(name)} is not one for a graft; use up to 64 small letters, digits and dashes")
    return name


def resolve(store: Store, tenant: TenantId, model: str) -> Graft:
    """The graft that a name or name@n means for the tenant now. Raises UnknownModel."""
    match = _MODEL.fullmatch(model)
    if match is None:
        raise UnknownModel(model)
    name, version = match[1], match[2]
    if version is None:
        alias = store.get(keys.alias(tenant, name))
        if alias is None or not alias.value.version:
            raise UnknownModel(model)
        version = str(alias.value.version)
    return _version(store, tenant, f"{name}@{version}")


def retried(once: Callable[[], Graft]) -> Graft:
    """What `once` returns when no other version of the name came between; the last Conflict if one always does."""
    for _ in range(TRIES - 1):
        try:
            return once()
        except Conflict:
            pass
    return once()


def _next(alias: Versioned[Alias] | None) -> int:
    return alias.value.latest + 1 if alias else 1


def _commit(
    store: Store, graft: Graft, job: Versioned[Job], alias: Versioned[Alias] | None, fence: Fence | None
) -> None:
    at = graft.created_at
    succeeded = JobSucceeded(
        job=job.value.id,
        model=graft.model,
        graft=graft.id,
        step=job.value.step,
        trained_tokens=job.value.trained_tokens,
        loss_before=job.value.loss_before,
        loss_after=job.value.loss_after,
        judged=job.value.judged,
        at=at,
    )
    writes, events = _named(graft, alias, job.value.spec.promote)
    done = Write(job.key, job_after(job.value, succeeded), job.version)
    store.commit([done, *writes], [succeeded, *events], fence=fence)


def _named(graft: Graft, alias: Versioned[Alias] | None, promote: bool) -> tuple[list[Write], list[Event]]:
    """What gives the graft its version of the name, and moves the name there if it is the first or is asked to."""
    moves = alias is None or not alias.value.version or promote
    current = graft.version if alias is None or moves else alias.value.version
    named = Alias(tenant=graft.tenant, name=graft.name, version=current, latest=graft.version)
    events: list[Event] = [GraftPublished(graft=graft, at=graft.created_at)]
    if moves:
        events.append(AliasMoved(tenant=graft.tenant, name=graft.name, version=graft.version, at=graft.created_at))
    return [
        Write(keys.graft(graft.tenant, graft.name, graft.version), graft, 0),
        Write(keys.alias(graft.tenant, graft.name), named, alias.version if alias else 0),
    ], events


def _version(store: Store, tenant: TenantId, model: str) -> Graft:
    name, _, version = model.rpartition("@")
    found = store.get(keys.graft(tenant, name, int(version)))
    if found is None:
        raise UnknownModel(model)
    return found.value

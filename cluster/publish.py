"""Give a trained graft its name: the next version of (tenant, name), the alias, the job's success, in one commit. And find it again."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polygraft.cluster.events import AliasMoved, Event, GraftPublished, JobSucceeded
from polygraft.cluster.evolve import job_after
from polygraft.cluster.model import Alias, Graft, GraftId, Job, TenantId
from polygraft.cluster.states import IllegalTransition, JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, Fence, Store, Versioned, Write

TRIES = 50  # jobs of one tenant that publish under one name at the same moment
_MODEL = re.compile(r"([a-z0-9-]{1,64})(?:@([1-9][0-9]{0,8}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a job produced, its folder already in place; losses are means over the held-out examples, if there are any."""

    graft: GraftId
    method: str
    backbone_fingerprint: str
    parameters: int
    bytes: int
    step: int
    trained_tokens: int
    loss_before: float | None
    loss_after: float | None


class UnknownModel(LookupError):
    """No such model for this tenant; another tenant's looks the same."""

    def __init__(self, model: str) -> None:
        super().__init__(f"model {model!r} does not exist; GET /v1/models lists yours")
        self.model = model


def publish(store: Store, *, job: Job, trained: Trained, at: float, fence: Fence | None = None) -> Graft:
    """The job's graft as `name@n`; publishing it again returns the same version.

    The first version of a name makes the alias; a later one moves it only if the job asks (`promote`). Raises Fenced, and
    IllegalTransition if the job ended otherwise meanwhile.
    """
    for attempt in range(TRIES):
        found = store.get(keys.job(job.id))
        if found is None:
            raise IllegalTransition(job.id, "absent", JobState.SUCCEEDED)
        if found.value.state is JobState.SUCCEEDED and found.value.graft == trained.graft:
            assert found.value.model is not None
            return _version(store, job.tenant, found.value.model)
        try:
            return _publish(store, found, trained, at, fence)
        except Conflict:
            if attempt == TRIES - 1:
                raise
    raise AssertionError("the loop returns or raises")


def resolve(store: Store, tenant: TenantId, model: str, backbone: str) -> Graft | None:
    """The graft that `model` (a name, or name@n) means for this tenant now; None for the bare backbone. Raises UnknownModel."""
    if model == backbone:
        return None
    match = _MODEL.fullmatch(model)
    if match is None:
        raise UnknownModel(model)
    name, version = match[1], match[2]
    if version is None:
        alias = store.get(keys.alias(tenant, name))
        if alias is None:
            raise UnknownModel(model)
        version = str(alias.value.version)
    return _version(store, tenant, f"{name}@{version}")


def _publish(store: Store, job: Versioned[Job], trained: Trained, at: float, fence: Fence | None) -> Graft:
    tenant, name = job.value.tenant, job.value.name
    alias = store.get(keys.alias(tenant, name))
    version = alias.value.latest + 1 if alias else 1
    graft = Graft(
        tenant=tenant,
        name=name,
        version=version,
        id=trained.graft,
        method=trained.method,
        backbone_fingerprint=trained.backbone_fingerprint,
        parameters=trained.parameters,
        bytes=trained.bytes,
        created_at=at,
        job=job.value.id,
    )
    succeeded = JobSucceeded(
        job=job.value.id,
        model=graft.model,
        graft=graft.id,
        step=trained.step,
        trained_tokens=trained.trained_tokens,
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        at=at,
    )
    current = version if alias is None or job.value.spec.promote else alias.value.version
    writes = [
        Write(job.key, job_after(job.value, succeeded), job.version),
        Write(keys.graft(tenant, name, version), graft, 0),
        Write(
            keys.alias(tenant, name),
            Alias(tenant=tenant, name=name, version=current, latest=version),
            alias.version if alias else 0,
        ),
    ]
    events: list[Event] = [succeeded, GraftPublished(graft=graft, at=at)]
    if current == version:
        events.append(AliasMoved(tenant=tenant, name=name, version=version, at=at))
    store.commit(writes, events, fence=fence)
    return graft


def _version(store: Store, tenant: TenantId, model: str) -> Graft:
    name, _, version = model.rpartition("@")
    found = store.get(keys.graft(tenant, name, int(version)))
    if found is None:
        raise UnknownModel(model)
    return found.value

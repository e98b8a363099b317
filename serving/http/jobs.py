"""`/v1/fine_tuning/jobs`: submit, list, look at, cancel and renew fine-tuning jobs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import JsonValue

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import Event, JobCancelRequested, JobLeaseRenewed, JobSubmitted
from polygraft.cluster.model import Job, JobId, TenantId
from polygraft.cluster.spec import FineTuningRequest
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.serving.http.body import read_body, read_json
from polygraft.serving.http.context import Api, ApiDep, TenantDep, TurnDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import ApiError, bad_request, not_found
from polygraft.serving.http.events import events_of
from polygraft.serving.http.once import once
from polygraft.serving.http.pages import first_of, not_in_list, page
from polygraft.serving.http.schemas import FineTuningJob, FineTuningJobEvent, JobErrorObject, Page, Renewal
from polygraft.serving.http.submission import new_job

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("", responses=answers(404, 409, *READING), openapi_extra=json_body(FineTuningRequest))
async def create(
    request: Request,
    api: ApiDep,
    tenant: TenantDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FineTuningJob:
    """Submit a job; on disk when this answers. The same Idempotency-Key and body again give the first job."""
    return await api.turns.work(tenant, _create, api, tenant, await read_json(request), idempotency_key)


@router.get("", responses=answers(400))
def jobs(api: ApiDep, tenant: TurnDep, after: str | None = None, limit: Limit = 20) -> Page[FineTuningJob]:
    """The tenant's jobs, newest first."""
    last = None if after is None else api.store.get(keys.job(JobId(after)))
    if after is not None and (last is None or last.value.tenant != tenant):
        raise not_in_list(after)
    found = api.store.newest(keys.jobs_of(tenant), before=last.value if last else None, limit=limit + 1)
    return first_of([shown_job(one.value) for one in found], limit)


@router.get("/{job}", responses=answers(404))
def job(job: str, api: ApiDep, tenant: TurnDep) -> FineTuningJob:
    return shown_job(_find(api, tenant, job))


@router.post("/{job}/cancel", responses=answers(400, 404))
def cancel(job: str, api: ApiDep, tenant: TurnDep) -> FineTuningJob:
    """Ask for the job's end; it is cancelled once its pack has let it go. Asking again changes nothing."""
    found = _find(api, tenant, job)
    if found.cancel_requested:
        return shown_job(found)
    try:
        return shown_job(advance_job(api.store, JobCancelRequested(job=found.id, at=api.clock())))
    except IllegalTransition:
        state = _find(api, tenant, job).state
        raise bad_request(f"job {job} is {state} already; there is nothing to cancel", code="job_finished") from None


@router.post("/{job}/renew", responses=answers(404, *READING), openapi_extra=json_body(Renewal))
async def renew(job: str, request: Request, api: ApiDep, tenant: TenantDep) -> FineTuningJob:
    """The owner still wants the job, for `lease_s` seconds more; a job that is over stays as it is."""
    renewal = await read_body(request, Renewal)
    return await api.turns.work(tenant, _renew, api, tenant, job, renewal.lease_s)


@router.get("/{job}/events", responses=answers(400, 404))
def events(
    job: str, api: ApiDep, tenant: TurnDep, after: str | None = None, limit: Limit = 20
) -> Page[FineTuningJobEvent]:
    """What the job's pack reported, messages and metrics, newest first."""
    return page(events_of(api.store, _find(api, tenant, job)), after=after, limit=limit)


def shown_job(job: Job) -> FineTuningJob:
    """The job in OpenAI's shape, with our fields added."""
    spec = job.spec
    common: dict[str, JsonValue] = {"n_epochs": spec.epochs, "batch_size": spec.batch_size}
    common["learning_rate_multiplier"] = spec.learning_rate_multiplier
    ours: dict[str, JsonValue] = {
        "peft": json.loads(spec.peft) if spec.peft.lstrip().startswith("{") else spec.peft,
        "learning_rate": spec.learning_rate,
        "optimizer": spec.optimizer,
        "schedule": spec.schedule,
        "warmup_ratio": spec.warmup_ratio,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "max_length": spec.max_length,
        "dropout": spec.dropout,
    }
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        model=spec.backbone,
        fine_tuned_model=job.model,
        organization_id=job.tenant,
        status=job.state.value,
        hyperparameters=common,
        method={"type": spec.kind, spec.kind: {"hyperparameters": {**common, **ours}}},
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        trained_tokens=job.trained_tokens if job.final else None,
        seed=spec.seed,
        error=JobErrorObject(code=job.error.code, message=job.error.message, param=job.error.param)
        if job.error
        else None,
        metadata=dict(spec.metadata),
        suffix=spec.suffix,
        graft=job.graft,
        pack=job.pack,
        parameters=job.parameters,
        step=job.step,
        steps_total=job.steps_total,
        loss_before=job.loss_before,
        loss_after=job.loss_after,
        scores_before=dict(job.judged.before.told),
        scores_after=dict(job.judged.after.told),
        test_file=spec.test_file,
        test_loss=job.judged.test_loss,
        test_scores=dict(job.judged.test.told),
        reason=job.reason.value if job.reason else None,
        owner=job.owner,
        lease_until=_seconds(job.lease_until),
        priority=spec.priority,
        devices=spec.devices,
        rung=None if spec.rung is None else asdict(spec.rung),
    )


def _create(api: Api, tenant: TenantId, body: JsonValue, idempotency_key: str | None) -> FineTuningJob:
    def new() -> tuple[list[Write], list[Event]]:
        record = new_job(api, tenant, body).job
        limit = api.limits.jobs_per_tenant
        if api.store.count(keys.unfinished_jobs_of(tenant)) >= limit:
            raise ApiError(
                429, f"{limit} of your jobs are unfinished, which is the limit; wait for some", code="too_many_jobs"
            )
        return [Write(keys.job(record.id), record, 0)], [JobSubmitted(record=record, at=record.created_at)]

    return shown_job(once(api.store, Job, f"{tenant}/fine_tuning", body, idempotency_key, new))


def _renew(api: Api, tenant: TenantId, job: str, lease_s: float) -> FineTuningJob:
    found = _find(api, tenant, job)
    if found.owner is None:
        raise bad_request(f"job {job} has no owner, so it has no lease; give `owner` when creating it", code="no_owner")
    now = api.clock()
    try:
        return shown_job(advance_job(api.store, JobLeaseRenewed(job=found.id, until=now + lease_s, at=now)))
    except IllegalTransition:
        return shown_job(_find(api, tenant, job))


def _find(api: Api, tenant: TenantId, job: str) -> Job:
    found = api.store.get(keys.job(JobId(job)))
    if found is None or found.value.tenant != tenant:
        raise not_found("job", job)
    return found.value


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)

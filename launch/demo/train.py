"""Stage 1: eight tenants submit eight jobs through the API and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import Client
from polygraft.launch.corpus import Share
from polygraft.launch.demo.plan import DemoJob
from polygraft.launch.output import Failure

_PERIOD_S = 4.0  # eight tenants that ask twice a second would cost the pack a third of a core


class JobsFailed(Failure):
    """Jobs that did not succeed, and why."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One of the eight: its data, its job, and its API key."""

    share: Share
    plan: DemoJob
    key: str


@dataclass(frozen=True, slots=True)
class Trained:
    tenant: Tenant
    job: RemoteJob

    @property
    def tokens_s(self) -> float:
        """Trained tokens a second of the job's own time in the pack, which it shared with the others."""
        job = self.job
        took = (job.finished_at or 0) - (job.started_at or 0)
        return (job.trained_tokens or 0) / max(1, took)


@dataclass(frozen=True, slots=True)
class Training:
    trained: tuple[Trained, ...]
    wall_s: float

    @property
    def tokens_s(self) -> float:
        """Of all jobs together, from the first submission to the last publication."""
        return sum(one.job.trained_tokens or 0 for one in self.trained) / self.wall_s


def train(
    url: str, backbone: str, tenants: Sequence[Tenant], *, on_progress: Callable[[Tenant, RemoteJob], None]
) -> Training:
    """Submit every tenant's job, then look at all of them until they are final. Raises JobsFailed."""
    start = time.perf_counter()
    clients = {tenant.key: Client(url, tenant.key) for tenant in tenants}
    try:
        jobs = [_submit(clients[tenant.key], backbone, tenant) for tenant in tenants]
        while not all(job.final for job in jobs):
            time.sleep(_PERIOD_S)
            jobs = [
                job if job.final else clients[tenant.key].job(job.id) for tenant, job in zip(tenants, jobs, strict=True)
            ]
            for tenant, job in zip(tenants, jobs, strict=True):
                on_progress(tenant, job)
    finally:
        for client in clients.values():
            client.close()
    wrong = [
        f"{job.id} ({tenant.plan.label}) {job.status}: {job.error and job.error.message}"
        for tenant, job in zip(tenants, jobs, strict=True)
        if job.status != "succeeded"
    ]
    if wrong:
        raise JobsFailed("; ".join(wrong))
    return Training(
        tuple(Trained(tenant, job) for tenant, job in zip(tenants, jobs, strict=True)), time.perf_counter() - start
    )


def _submit(client: Client, backbone: str, tenant: Tenant) -> RemoteJob:
    share = tenant.share
    training = client.upload(share.train_jsonl, filename=f"{share.name}.jsonl")
    held_out = client.upload(share.held_out_jsonl, filename=f"{share.name}-held-out.jsonl")
    body = tenant.plan.body(model=backbone, training_file=training.id, validation_file=held_out.id, suffix=share.name)
    return client.create_job(body, idempotency_key=training.id)

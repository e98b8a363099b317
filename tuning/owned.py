"""Jobs that a search owns: submitted once whatever happens, kept by a lease that is renewed."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import Client


def submitted(client: Client, body: Mapping[str, JsonValue], *, study: str, name: str, lease_s: float) -> RemoteJob:
    """The job that an earlier driver submitted under this name of the study, unless it was cancelled when nobody spoke
    for it; then another one in its place, the same for every driver. Its lease begins anew. Raises what the client
    raises."""
    job = client.create_job(body, idempotency_key=f"{study}/{name}")
    while job.status == "cancelled":
        job = client.create_job(body, idempotency_key=f"{study}/after/{job.id}")
    return job if job.final else client.renew(job.id, lease_s)

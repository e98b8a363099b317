"""`/v1/fine_tuning/dry_runs`: what a job would be, its examples counted, without making it."""

from __future__ import annotations

import time
from math import ceil

from fastapi import APIRouter, Request
from pydantic import JsonValue

from polygraft.cluster.model import FileId, Job, TenantId
from polygraft.cluster.spec import FineTuningRequest
from polygraft.grafts.text import jsonl
from polygraft.grafts.text.lengths import Lengths
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.http.body import read_json
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.files import find_file
from polygraft.serving.http.named import backbone_named
from polygraft.serving.http.schemas import DryRun, DryRunFile
from polygraft.serving.http.submission import new_job

router = APIRouter(prefix="/v1/fine_tuning/dry_runs")
_READ_S = 20.0  # how long a request may count examples; what was not read is said


@router.post("", responses=answers(404, *READING), openapi_extra=json_body(FineTuningRequest))
async def dry_run(request: Request, api: ApiDep, tenant: TenantDep) -> DryRun:
    """Check the body of a new job and count its tokens and what its `max_length` cuts. Nothing is made."""
    return await api.turns.work(tenant, _dry_run, api, tenant, await read_json(request))


def _dry_run(api: Api, tenant: TenantId, body: JsonValue) -> DryRun:
    job = new_job(api, tenant, body)
    tokeniser = backbone_named(api, job.spec.backbone).tokeniser
    until = time.monotonic() + _READ_S
    given = {"training_file": job.spec.training_file, "validation_file": job.spec.validation_file}
    files = {
        param: _counted(api, tenant, job, tokeniser, file, param, until)
        for param, file in given.items()
        if file is not None
    }
    training = files["training_file"]
    return DryRun(
        model=job.spec.backbone,
        peft=job.spec.peft,
        parameters=job.parameters or 0,
        learning_rate=job.spec.learning_rate,
        max_length=job.spec.max_length,
        steps=ceil(training.examples / job.spec.batch_size) * job.spec.epochs if training.complete else None,
        training_file=training,
        validation_file=files.get("validation_file"),
    )


def _counted(  # noqa: PLR0913
    api: Api, tenant: TenantId, job: Job, tokeniser: Tokeniser, file: FileId, param: str, until: float
) -> DryRunFile:
    record = find_file(api, tenant, file, param=param).value
    lengths = Lengths()
    for example in jsonl.read(api.blob(record), jsonl.Limits(line_bytes=api.limits.line_bytes)):
        lengths = lengths.plus(tokeniser.encode_example(example, job.spec.max_length))
        if time.monotonic() > until:
            break
    return DryRunFile(
        id=file,
        examples=lengths.examples,
        complete=lengths.examples == record.examples,
        tokens=lengths.tokens,
        trained_tokens=lengths.trained,
        longest=lengths.longest,
        cut=lengths.cut,
        cut_tokens=lengths.cut_tokens,
        cut_trained_tokens=lengths.cut_trained,
        warning=lengths.warning(job.spec.max_length),
    )

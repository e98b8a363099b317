"""`/v1/fine_tuning/dry_runs`: what a job would be, its examples counted, without making it."""

from __future__ import annotations

import time
from math import ceil

from fastapi import APIRouter, Request
from pydantic import JsonValue

from polygraft.cluster.model import DataFile, FileId, TenantId
from polygraft.cluster.spec import FineTuningRequest
from polygraft.grafts.text.lengths import Lengths
from polygraft.serving.http.body import read_json
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.files import find_file
from polygraft.serving.http.schemas import DryRun, DryRunFile
from polygraft.serving.http.submission import Reading, encoded, files_of, new_job

router = APIRouter(prefix="/v1/fine_tuning/dry_runs")
_READ_S = 20.0  # how long a request may count examples; what was not read is said


@router.post("", responses=answers(404, *READING), openapi_extra=json_body(FineTuningRequest))
async def dry_run(request: Request, api: ApiDep, tenant: TenantDep) -> DryRun:
    """Check the body of a new job and count its tokens and what its `max_length` cuts. Nothing is made."""
    return await api.turns.work(tenant, _dry_run, api, tenant, await read_json(request))


def _dry_run(api: Api, tenant: TenantId, body: JsonValue) -> DryRun:
    made = new_job(api, tenant, body)
    job = made.job
    until = time.monotonic() + _READ_S

    def counted(param: str, file: FileId) -> DryRunFile:
        return _counted(api, find_file(api, tenant, file, param=param).value, made.reading, param, until)

    training, held_out, test = (
        None if file is None else counted(param, file) for param, file in files_of(job.spec).items()
    )
    assert training is not None, "a job has a training file"
    return DryRun(
        model=job.spec.backbone,
        peft=job.spec.peft,
        parameters=job.parameters or 0,
        learning_rate=job.spec.learning_rate,
        max_length=made.reading.limit,
        steps=ceil(training.examples / job.spec.batch_size) * job.spec.epochs if training.complete else None,
        training_file=training,
        validation_file=held_out,
        test_file=test,
    )


def _counted(api: Api, record: DataFile, reading: Reading, param: str, until: float) -> DryRunFile:
    lengths = Lengths()
    for _, tokens in encoded(api, reading, api.blob(record), param):
        lengths = lengths.plus(tokens)
        if time.monotonic() > until:
            break
    return DryRunFile(
        id=record.id,
        examples=lengths.examples,
        complete=lengths.examples == record.examples,
        tokens=lengths.tokens,
        trained_tokens=lengths.trained,
        longest=lengths.longest,
        cut=lengths.cut,
        cut_tokens=lengths.cut_tokens,
        cut_trained_tokens=lengths.cut_trained,
        warning=lengths.warning(reading.limit),
    )

"""`/v1/files`: uploads of training data, checked line by line before they exist for anyone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from polygraft.cluster.ids import new_file_id
from polygraft.cluster.model import DataFile, FileId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Versioned, Write, WriteRefused
from polygraft.cluster.validation import shown
from polygraft.grafts.text import jsonl
from polygraft.kernels.common.atomic import move
from polygraft.serving.http.context import Api, ApiDep, TenantDep, TurnDep
from polygraft.serving.http.documents import READING, answers, form_body
from polygraft.serving.http.errors import ApiError, bad_request, not_found
from polygraft.serving.http.needed import needed_by
from polygraft.serving.http.pages import page
from polygraft.serving.http.schemas import Deleted, FileObject, Page
from polygraft.serving.http.upload import Upload, receive

PURPOSE = "fine-tune"
CONTENT = "application/jsonl"
router = APIRouter(prefix="/v1/files")


@router.post("", responses=answers(*READING), openapi_extra=form_body(purpose={"type": "string", "enum": [PURPOSE]}))
async def upload(request: Request, api: ApiDep, tenant: TenantDep) -> FileObject:
    """Store a JSONL file of chat examples; a bad line is a 400 that names it, and nothing is kept."""
    received = await receive(
        request, folder=api.folders.files / ".incoming", limit_bytes=api.limits.upload_bytes, fields=("purpose",)
    )
    try:
        return await api.turns.work(tenant, _keep, api, tenant, received)
    finally:
        await run_in_threadpool(received.path.unlink, missing_ok=True)


@router.get("", responses=answers(400))
def files(
    api: ApiDep,
    tenant: TurnDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    purpose: str | None = None,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
) -> Page[FileObject]:
    """The tenant's files by age."""
    found = (one.value for one in api.store.newest(keys.files_of(tenant)))
    mine = [file for file in found if purpose in (None, file.purpose)]
    return page([_shown(file) for file in mine[:: 1 if order == "desc" else -1]], after=after, limit=limit)


@router.get("/{file}", responses=answers(404))
def file(file: str, api: ApiDep, tenant: TurnDep) -> FileObject:
    return _shown(find_file(api, tenant, file, param="id").value)


@router.get(
    "/{file}/content",
    response_class=FileResponse,
    responses={200: {"content": {CONTENT: {"schema": {"type": "string"}}}}, **answers(404)},
)
def content(file: str, api: ApiDep, tenant: TurnDep) -> FileResponse:
    found = find_file(api, tenant, file, param="id").value
    blob = api.blob(found)
    if not blob.is_file():
        raise ApiError(404, f"the content of {shown(file)} is gone; upload it again", param="id", code="content_gone")
    return FileResponse(blob, media_type=CONTENT, filename=found.filename)


@router.delete("/{file}", responses=answers(404, 409))
def delete(file: str, api: ApiDep, tenant: TurnDep) -> Deleted:
    """Refused (409) while an unfinished job or a running search needs the file."""
    found = find_file(api, tenant, file, param="id")
    if (who := needed_by(api, tenant, file)) is not None:
        raise ApiError(409, f"file {file} is in use by {who}; cancel it or wait", param="id", code="file_in_use")
    api.store.commit([Write(found.key, None, found.version)])
    api.blob(found.value).unlink(missing_ok=True)
    return Deleted(id=file, object="file")


def find_file(api: Api, tenant: TenantId, file: str, *, param: str) -> Versioned[DataFile]:
    """The tenant's file. Raises ApiError 404."""
    found = api.store.get(keys.file(FileId(file)))
    if found is None or found.value.tenant != tenant:
        raise not_found("file", file, param=param)
    return found


def _keep(api: Api, tenant: TenantId, received: Upload) -> FileObject:
    purpose = received.fields.get("purpose", "")
    if purpose != PURPOSE:
        raise bad_request(f"purpose: {shown(purpose)} is not supported; use {PURPOSE!r}", param="purpose")
    limits = jsonl.Limits(file_bytes=api.limits.upload_bytes, line_bytes=api.limits.line_bytes)
    try:
        examples = sum(1 for _ in jsonl.read_any(received.path, limits))
    except jsonl.DataError as error:
        raise bad_request(f"file: {error}", param="file", code="invalid_file") from None
    record = DataFile(
        id=new_file_id(),
        tenant=tenant,
        filename=received.filename,
        bytes=received.bytes,
        purpose=purpose,
        created_at=api.clock(),
        digest=received.digest,
        examples=examples,
    )
    # The blob first: a record never names content that is not on disk, and a blob without a record is only waste.
    move(received.path, api.blob(record))
    try:
        api.store.commit([Write(keys.file(record.id), record, 0)])
    except WriteRefused:  # of a full disk, which the blob would keep full
        api.blob(record).unlink()
        raise
    return _shown(record)


def _shown(file: DataFile) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.bytes, created_at=int(file.created_at), filename=file.filename, purpose=file.purpose
    )

"""`/v1/grafts`: a tenant's grafts and their versions; uploads of grafts made elsewhere; export, promotion, deletion."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from polygraft.cluster import versions
from polygraft.cluster.model import Graft, GraftId, TenantId
from polygraft.cluster.publish import BadName, UnknownModel, adopt, check_name, resolve
from polygraft.cluster.store import keys
from polygraft.cluster.validation import shown
from polygraft.kernels.common.atomic import move
from polygraft.serving.adoption import Busy, NotSaved, Refused, Saved
from polygraft.serving.http.archives import BadArchive, TooLarge, packed, unpack
from polygraft.serving.http.body import read_body
from polygraft.serving.http.context import Api, ApiDep, TenantDep, TurnDep
from polygraft.serving.http.documents import READING, answers, form_body, json_body
from polygraft.serving.http.errors import ApiError, artefacts_full, bad_request, not_found
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import backbone_named
from polygraft.serving.http.needed import needed_by
from polygraft.serving.http.pages import page
from polygraft.serving.http.schemas import Deleted, GraftImport, GraftObject, Page
from polygraft.serving.http.upload import receive

router = APIRouter(prefix="/v1/grafts")
ARCHIVE = "application/x-tar"
NATIVE = ("graft.json", "graft.safetensors")
_VERSION = re.compile(r"([a-z0-9-]{1,64})@([1-9][0-9]{0,8})", re.ASCII)
_NAME = {"type": "string", "pattern": "^[a-z0-9-]{1,64}$"}
_PROMOTE = {"type": "string", "enum": ["true", "false"], "default": "false"}
_BACKBONE = {"type": "string", "default": "", "description": "the one it is for; empty: the service's own"}
_BOOLEANS = {"": False, "false": False, "true": True}


@router.get("", responses=answers(400))
def grafts(
    api: ApiDep,
    tenant: TurnDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    name: str | None = None,
) -> Page[GraftObject]:
    """The tenant's grafts, all versions of each name, or of one."""
    mine = [one.value for one in api.store.scan(keys.grafts(tenant)) if name in (None, one.value.name)]
    meant = {(one.value.name, one.value.version) for one in api.store.scan(keys.aliases(tenant))}
    mine.sort(key=lambda graft: (graft.name, graft.version))
    return page([_shown(api, one, (one.name, one.version) in meant) for one in mine], after=after, limit=limit)


@router.post(
    "", responses=answers(404, *READING), openapi_extra=form_body(name=_NAME, promote=_PROMOTE, backbone=_BACKBONE)
)
async def upload(request: Request, api: ApiDep, tenant: TenantDep) -> GraftObject:
    """Give the service a graft made elsewhere, a tar archive of its folder: ours, PEFT's or AdapterHub's."""
    fields = ("name", "promote", "backbone")
    incoming = api.folders.files / ".incoming"
    received = await receive(request, folder=incoming, limit_bytes=api.limits.graft_bytes, fields=fields)
    scratch: Path | None = None
    try:
        name = checked_name(api, received.fields.get("name", ""))
        backbone = await api.turns.work(
            tenant, backbone_named, api, received.fields.get("backbone") or None, param="backbone"
        )
        promote = received.fields.get("promote", "").lower()
        if promote not in _BOOLEANS:
            raise bad_request(f"promote: {shown(promote)} is not true or false", param="promote")
        scratch = Path(await run_in_threadpool(tempfile.mkdtemp, dir=incoming))
        await api.turns.work(tenant, _unpack, api, received.path, scratch / name)
        return await adopted(api, tenant, backbone, scratch / name, name, _BOOLEANS[promote])
    finally:
        await run_in_threadpool(received.path.unlink, missing_ok=True)
        if scratch is not None:
            await run_in_threadpool(shutil.rmtree, scratch, ignore_errors=True)


@router.post("/import", responses=answers(404, *READING), openapi_extra=json_body(GraftImport))
async def import_graft(request: Request, api: ApiDep, tenant: TenantDep) -> GraftObject:
    """Give the service a graft whose folder lies under one of its configured roots (`graft_roots`)."""
    body = await read_body(request, GraftImport)
    name = checked_name(api, body.name)
    backbone = await api.turns.work(tenant, backbone_named, api, body.backbone, param="backbone")
    folder = await api.turns.work(tenant, under_a_root, api, body.path)
    return await adopted(api, tenant, backbone, folder, name, body.promote)


@router.get("/{graft}", responses=answers(404))
def graft(graft: str, api: ApiDep, tenant: TurnDep) -> GraftObject:
    """A version, `name@n`, or the one that a bare name means."""
    return _shown_now(api, _find(api, tenant, graft))


@router.delete("/{graft}", responses=answers(400, 404, 409))
def delete(graft: str, api: ApiDep, tenant: TurnDep) -> Deleted:
    """Delete the version `name@n`; refused (409) while its name means it and could mean another, an answer is being
    generated with it, or an unfinished job or a running search is made over it. The number is not given out again."""
    name, version = _version(api, tenant, graft)
    found = _find(api, tenant, graft)
    if api.backbones.uses(tenant, found.id):
        raise ApiError(409, f"{graft} is generating answers; wait", param="id", code="graft_in_use")
    if (who := needed_by(api, tenant, graft)) is not None:
        raise ApiError(409, f"{who} is made over {graft}; cancel it or wait", param="id", code="graft_in_use")
    try:
        versions.delete(api.store, tenant, name, version, at=api.clock())
    except versions.InUse as error:
        raise ApiError(409, str(error), param="id", code="graft_in_use") from None
    except UnknownModel:
        raise not_found("graft", graft) from None
    _remove(api, found.id)
    return Deleted(id=graft, object="graft")


@router.get(
    "/{graft}/export",
    response_class=StreamingResponse,
    responses={200: {"content": {ARCHIVE: {"schema": {"type": "string"}}}}, **answers(400, 404)},
)
def export(
    graft: str, api: ApiDep, tenant: TurnDep, format: Annotated[Literal["native", "peft"], Query()] = "native"
) -> StreamingResponse:
    """A tar archive of the graft's files: all, or those of PEFT where PEFT has the method."""
    found = _find(api, tenant, graft)
    folder = api.folders.grafts / found.id
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        names = []
    if not names:
        raise ApiError(404, f"the files of {shown(graft)} are gone; import it again", param="id", code="content_gone")
    chosen = [name for name in names if format == "native" or name not in NATIVE]
    if not chosen:
        message = f"format: PEFT has no {found.method}; export {graft} as 'native'"
        raise bad_request(message, param="format", code="no_such_format")
    try:
        files = [(name, (folder / name).open("rb")) for name in chosen]
    except FileNotFoundError:  # it was deleted meanwhile
        raise not_found("graft", graft) from None
    headers = {"Content-Disposition": f'attachment; filename="{found.name}-{found.version}.tar"'}
    return StreamingResponse(packed(files), media_type=ARCHIVE, headers=headers)


@router.post("/{graft}/promote", responses=answers(400, 404))
def promote(graft: str, api: ApiDep, tenant: TurnDep) -> GraftObject:
    """Let the name mean the version `name@n` from now on."""
    name, version = _version(api, tenant, graft)
    try:
        return _shown_now(api, versions.promote(api.store, tenant, name, version, at=api.clock()))
    except UnknownModel:
        raise not_found("graft", graft) from None


@router.post("/{graft}/rollback", responses=answers(400, 404, 409))
def roll_back(graft: str, api: ApiDep, tenant: TurnDep) -> GraftObject:
    """Let the name mean the version before the one that it means."""
    name = _find(api, tenant, graft).name
    if graft != name:
        raise bad_request(f"{shown(graft)} is a version; give its name alone", param="id")
    try:
        return _shown_now(api, versions.roll_back(api.store, tenant, name, at=api.clock()))
    except versions.NoVersionBefore as error:
        raise ApiError(409, str(error), param="id", code="no_version_before") from None
    except UnknownModel:
        raise not_found("graft", graft) from None


def _find(api: Api, tenant: TenantId, graft: str) -> Graft:
    """The tenant's graft of that name or version. Raises ApiError 404."""
    try:
        return resolve(api.store, tenant, graft)
    except UnknownModel:
        raise not_found("graft", graft) from None


def _version(api: Api, tenant: TenantId, graft: str) -> tuple[str, int]:
    """The parts of `name@n`. Raises ApiError 404, and 400 for the name of a graft alone."""
    match = _VERSION.fullmatch(graft)
    if match is None:
        found = _find(api, tenant, graft)
        raise bad_request(f"{shown(graft)} is a name; give a version of it, such as {found.model}", param="id")
    return match[1], int(match[2])


def checked_name(api: Api, name: str) -> str:
    """The name, which a graft can have. Raises ApiError 400."""
    try:
        if name in api.backbones.names:
            raise BadName(f"name: {name!r} is that of a backbone; choose another")
        return check_name(name)
    except BadName as error:
        raise bad_request(str(error), param="name", code="invalid_value") from None


def _unpack(api: Api, archive: Path, folder: Path) -> None:
    try:
        unpack(archive, folder, limit_bytes=api.limits.graft_bytes)
    except TooLarge as error:
        raise ApiError(413, f"file: {error}", param="file", code="file_too_large") from None
    except BadArchive as error:
        raise bad_request(f"file: {error}", param="file", code="invalid_file") from None


def under_a_root(api: Api, path: str) -> Path:
    """The folder, which no link leads out of the roots. Raises ApiError 400."""
    if not api.graft_roots:
        raise bad_request("path: this service has no graft_roots to import from; upload the folder", param="path")
    try:
        folder = Path(path).resolve()
        inside = any(folder.is_relative_to(root.resolve()) for root in api.graft_roots) and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, holds a null, a loop of links
        inside = False
    if not inside:
        raise bad_request(f"path: {shown(path)} is no folder under the service's graft_roots", param="path")
    return folder


async def adopted(
    api: Api, tenant: TenantId, backbone: KnownBackbone, folder: Path, name: str, promote: bool
) -> GraftObject:
    """The graft of that backbone which the folder holds, under the next version of the name. Raises ApiError."""
    try:
        saved = await backbone.adoption.read(tenant, folder, api.folders.grafts)
        found = await api.turns.work(tenant, _published, api, tenant, name, saved, promote)
        if not (api.folders.grafts / saved.graft).is_dir():  # whoever deleted the last of its twins took it away
            await backbone.adoption.read(tenant, folder, api.folders.grafts)
    except Refused as error:
        raise bad_request(f"graft: {error}", param="file", code="invalid_graft") from None
    except Busy as error:
        raise ApiError(429, f"{error}", code="too_many_imports", headers={"Retry-After": "5"}) from None
    except NotSaved as error:
        if error.full:
            raise artefacts_full() from None
        raise
    return await api.turns.work(tenant, _shown_now, api, found)


def _published(api: Api, tenant: TenantId, name: str, saved: Saved, promote: bool) -> Graft:
    return adopt(
        api.store,
        tenant,
        name,
        graft=saved.graft,
        method=saved.method,
        backbone_fingerprint=saved.fingerprint,
        parameters=saved.parameters,
        bytes=saved.bytes,
        context_length=saved.context_length,
        at=api.clock(),
        promote=promote,
    )


def _remove(api: Api, graft: GraftId) -> None:
    """Remove the folder, unless another version, of whatever tenant, is the same graft.

    It is first moved away, then looked for again: whoever publishes the same graft meanwhile either is seen, and gets
    it back, or sees that it is gone, and saves it again.
    """
    folder, away = api.folders.grafts / graft, api.folders.grafts / f".deleted-{token_hex(8)}"
    if _named(api, graft):
        return
    with suppress(FileNotFoundError):
        move(folder, away)
    if _named(api, graft):
        with suppress(OSError):  # it has been saved again
            move(away, folder)
    shutil.rmtree(away, ignore_errors=True)


def _named(api: Api, graft: GraftId) -> bool:
    return any(one.value.id == graft for one in api.store.scan(keys.GRAFTS))


def _shown_now(api: Api, graft: Graft) -> GraftObject:
    alias = api.store.get(keys.alias(graft.tenant, graft.name))
    return _shown(api, graft, alias is not None and alias.value.version == graft.version)


def _shown(api: Api, graft: Graft, current: bool) -> GraftObject:
    known = api.backbones.of(graft)
    return GraftObject(
        id=graft.model,
        name=graft.name,
        version=graft.version,
        current=current,
        graft=graft.id,
        method=graft.method,
        backbone=known.name if known is not None else None,
        backbone_fingerprint=graft.backbone_fingerprint,
        parameters=graft.parameters,
        bytes=graft.bytes,
        context_length=graft.context_length,
        created_at=int(graft.created_at),
        job=graft.job,
    )

"""`/v1/backbones`: the frozen models that jobs and requests may name; the operator adds and removes them."""

from __future__ import annotations

from fastapi import APIRouter, Request

from polygraft.cluster.api_keys import OPERATOR
from polygraft.cluster.backbones import (
    BadBackboneName,
    Taken,
    add_backbone,
    advance_backbone,
    backbones,
    check_backbone_name,
    is_answering,
)
from polygraft.cluster.events import BackboneRemoved
from polygraft.cluster.model import Backbone, TenantId
from polygraft.cluster.policy.capacity import DoesNotFit
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.validation import shown
from polygraft.grafts.runtime.checked import BackboneError
from polygraft.serving.http.body import read_body
from polygraft.serving.http.context import Api, ApiDep, TenantDep, TurnDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import ApiError, bad_request
from polygraft.serving.http.named import names_of
from polygraft.serving.http.needed import searches_on
from polygraft.serving.http.schemas import BackboneObject, Deleted, NewBackbone, Page

router = APIRouter(prefix="/v1/backbones")


@router.get("", responses=answers())
def list_backbones(api: ApiDep, tenant: TurnDep) -> Page[BackboneObject]:
    """All of them, the service's own first."""
    found = sorted(backbones(api.store), key=lambda one: (one.name != api.backbones.own, one.name))
    data = tuple(_shown(api, tenant, one) for one in found)
    return Page(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.post("", responses=answers(403, 409, *READING), openapi_extra=json_body(NewBackbone))
async def add(request: Request, api: ApiDep, tenant: TenantDep) -> BackboneObject:
    """Add a model, which is read and checked before this answers, and loaded when it is first asked. Adding the same
    again changes nothing."""
    body = await read_body(request, NewBackbone)
    return await api.turns.work(tenant, _added, api, tenant, body)


@router.delete("/{backbone:path}", responses=answers(403, 404, 409))
def remove(backbone: str, api: ApiDep, tenant: TurnDep) -> Deleted:
    """Remove the model from the service; its files and the grafts on it stay. Refused (409) while unfinished jobs,
    running searches or answers need it, and for the service's own."""
    _check_operator(tenant)
    if api.store.get(keys.backbone(backbone)) is None:
        raise _unknown(api, backbone)
    if (why := _in_use(api, backbone)) is not None:
        raise ApiError(409, f"{shown(backbone)} {why}", param="id", code="backbone_in_use")
    try:
        advance_backbone(api.store, BackboneRemoved(backbone=backbone, at=api.clock()))
    except IllegalTransition:
        raise _unknown(api, backbone) from None
    api.backbones.look()
    return Deleted(id=backbone, object="backbone")


def _added(api: Api, tenant: TenantId, body: NewBackbone) -> BackboneObject:
    _check_operator(tenant)
    try:
        name = check_backbone_name(body.name)
        found = api.candidate(body.path, body.quantise)
    except BadBackboneName as error:
        raise bad_request(f"{error}", param="name", code="invalid_value") from None
    except BackboneError as error:
        raise bad_request(
            f"path: {str(error).removeprefix('backbone: ')}", param="path", code="invalid_backbone"
        ) from None
    record = found.backbone(name, dtype=body.dtype, quantise=body.quantise, at=api.clock(), asked=False)
    try:
        record = api.sized(record)
    except DoesNotFit as error:
        raise bad_request(f"path: {error}", param="path", code="no_device_fits") from None
    try:
        record = add_backbone(api.store, record)
    except Taken as error:
        raise ApiError(409, f"{error}", param=f"{error}".partition(":")[0], code="backbone_exists") from None
    api.backbones.look()
    return _shown(api, tenant, record)


def _unknown(api: Api, name: str) -> ApiError:
    api.backbones.look()
    message = f"backbone {shown(name)} does not exist; this service has {names_of(api)}"
    return ApiError(404, message, param="id", code="backbone_not_found")


def _in_use(api: Api, name: str) -> str | None:
    if name == api.backbones.own:
        return "is the service's own; start the service with another one first"
    known = api.backbones.named(name)
    if (known is not None and api.backbones.busy(known)) or is_answering(api.store, name):
        return "is generating answers; wait"
    jobs = sum(found.value.spec.backbone == name and not found.value.final for found in api.store.scan(keys.JOBS))
    if jobs:
        return f"has {jobs} unfinished jobs; cancel them or wait"
    searches = searches_on(api, name)
    return f"has {searches} running searches; cancel them or wait" if searches else None


def _check_operator(tenant: TenantId) -> None:
    if tenant != OPERATOR:
        message = f"backbones are the operator's: ask with a key of the tenant {OPERATOR!r}"
        raise ApiError(403, message, code="not_the_operator")


def _shown(api: Api, tenant: TenantId, record: Backbone) -> BackboneObject:
    known = api.backbones.named(record.name)
    held = known is not None and known.gateway.ready()
    wanted = known is not None and api.backbones.wanted(known)
    return BackboneObject(
        id=record.name,
        default=record.name == api.backbones.own,
        path=record.folder if tenant == OPERATOR else None,
        dtype=record.dtype,
        quantise=record.quantise,
        fingerprint=record.fingerprint,
        context_length=record.context_length,
        state="loaded" if held else "loading" if wanted else "unloaded",
        added_at=int(record.added_at),
    )

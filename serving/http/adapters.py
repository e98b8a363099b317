"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: the import of a folder under one of
`graft_roots`, and the deletion of what was imported."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from polygraft.cluster import versions
from polygraft.cluster.model import TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.validation import shown
from polygraft.serving.http import grafts
from polygraft.serving.http.body import read_body
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, Document, answers, json_body
from polygraft.serving.http.errors import ApiError, bad_request, not_found
from polygraft.serving.http.named import backbone_named
from polygraft.serving.http.schemas import LoadAdapter, UnloadAdapter

router = APIRouter(prefix="/v1")
_DONE: dict[int | str, Document] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.post(
    "/load_lora_adapter",
    response_class=Response,
    responses={**_DONE, **answers(*READING)},
    openapi_extra=json_body(LoadAdapter),
)
async def load(request: Request, api: ApiDep, tenant: TenantDep) -> PlainTextResponse:
    """Serve the adapter in a folder, on the service's own backbone, under a name. Loading a name again, in place, makes
    its next version, and requests that began with the one before end with it."""
    body = await read_body(request, LoadAdapter)
    try:
        name = grafts.checked_name(api, body.lora_name)
        folder = await api.turns.work(tenant, grafts.under_a_root, api, body.lora_path)
    except ApiError as error:  # about a name or a path
        raise bad_request(f"lora_{error.message}", param=f"lora_{error.param}", code=error.code) from None
    present = await api.turns.work(tenant, versions.versions, api.store, tenant, name)
    if present and not body.load_inplace:
        message = f"lora_name: {shown(name)} is there already; set load_inplace to let it mean another graft"
        raise bad_request(message, param="lora_name", code="already_loaded")
    backbone = await api.turns.work(tenant, backbone_named, api, None)
    await grafts.adopted(api, tenant, backbone, folder, name, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=Response,
    responses={**_DONE, **answers(404, 409, *READING)},
    openapi_extra=json_body(UnloadAdapter),
)
async def unload(request: Request, api: ApiDep, tenant: TenantDep) -> PlainTextResponse:
    """Forget an adapter with all its versions. What a job trained is not unloaded, since nothing else has it: 409."""
    body = await read_body(request, UnloadAdapter)
    await api.turns.work(tenant, _unload, api, tenant, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _unload(api: Api, tenant: TenantId, name: str) -> None:
    found = [one.value for one in versions.versions(api.store, tenant, name)]
    if not found:
        raise not_found("adapter", name, param="lora_name")
    if trained := next((one for one in found if one.job is not None), None):
        message = f"{trained.model} was trained by {trained.job}; DELETE /v1/grafts/{trained.model} if it is to go"
        raise ApiError(409, message, param="lora_name", code="trained_here")
    alias = api.store.get(keys.alias(tenant, name))
    meant = alias.value.version if alias is not None else 0
    for one in sorted(found, key=lambda one: one.version == meant):  # the one that the name means goes last
        grafts.delete(one.model, api, tenant)

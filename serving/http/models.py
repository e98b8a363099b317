"""`/v1/models`: the bare backbones, every version of the tenant's grafts, and the names that stand for one of them."""

from __future__ import annotations

from fastapi import APIRouter

from polygraft.cluster.model import TenantId
from polygraft.cluster.store import keys
from polygraft.serving.http.context import Api, ApiDep, TurnDep
from polygraft.serving.http.documents import answers
from polygraft.serving.http.errors import not_found
from polygraft.serving.http.schemas import ModelObject, Page

router = APIRouter(prefix="/v1/models")
OURS = "polygraft"


@router.get("", responses=answers())
def models(api: ApiDep, tenant: TurnDep) -> Page[ModelObject]:
    data = _models(api, tenant)
    return Page(data=data, first_id=data[0].id, last_id=data[-1].id)


@router.get("/{model:path}", responses=answers(404))
def model(model: str, api: ApiDep, tenant: TurnDep) -> ModelObject:
    for found in _models(api, tenant):
        if found.id == model:
            return found
    raise not_found("model", model, param="model")


def _models(api: Api, tenant: TenantId) -> tuple[ModelObject, ...]:
    """The default backbone first, then the others; then names in order, each followed by its versions."""
    grafts = {(found.value.name, found.value.version): found.value for found in api.store.scan(keys.grafts(tenant))}
    aliases = {found.value.name: found.value.version for found in api.store.scan(keys.aliases(tenant))}
    listed = [
        ModelObject(id=one.name, created=int(one.record.added_at), owned_by=OURS, root=one.name)
        for one in api.backbones
    ]
    for (name, version), graft in sorted(grafts.items()):
        known = api.backbones.of(graft)
        parent = graft.backbone_fingerprint if known is None else known.name
        for id in [name, graft.model] if aliases.get(name) == version else [graft.model]:
            created = int(graft.created_at)
            listed.append(ModelObject(id=id, created=created, owned_by=tenant, root=graft.model, parent=parent))
    return tuple(listed)

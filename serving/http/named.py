"""Which backbone a request means: by its own name, or by a graft that has grown on it."""

from __future__ import annotations

from polygraft.cluster.model import Graft, TenantId
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.validation import shown
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import ApiError, bad_request, unavailable
from polygraft.serving.http.known import KnownBackbone


def backbone_named(api: Api, name: str | None, *, param: str = "model") -> KnownBackbone:
    """The backbone of that name, the default one for None. Raises ApiError 404 with the names that there are."""
    if name is None:
        if (default := api.backbones.default) is None:
            raise unavailable("the service's own backbone cannot be had; its log says why")
        return default
    if (found := api.backbones.named(name)) is None:
        message = f"{param}: {shown(name)} is no backbone of this service; it has {names_of(api)}"
        raise ApiError(404, message, param=param, code="model_not_found")
    return found


def model_named(api: Api, tenant: TenantId, model: str) -> tuple[KnownBackbone, Graft | None]:
    """What the model's name means: a backbone, bare or with a graft of the tenant's. Raises ApiError 404, and 400 for a
    graft on a backbone that is not there."""
    if (bare := api.backbones.named(model)) is not None:
        return bare, None
    try:
        graft = resolve(api.store, tenant, model)
    except UnknownModel as error:
        message = f"{error}; backbones of this service: {names_of(api)}"
        raise ApiError(404, message, param="model", code="model_not_found") from None
    if (known := api.backbones.of(graft)) is None:
        raise bad_request(
            f"model: {shown(model)} was trained on another backbone than {names_of(api)}: one with the fingerprint "
            f"{graft.backbone_fingerprint[:12]}",
            param="model",
        )
    return known, graft


def names_of(api: Api) -> str:
    """All backbones there are."""
    return ", ".join(api.backbones.names) or "none"

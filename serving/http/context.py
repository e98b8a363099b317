"""What the routes stand on: the store, the gateway, what is known of the backbone, and who is calling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from polygraft.cluster.model import DataFile, Limits, TenantId
from polygraft.cluster.settings import LimitSettings
from polygraft.cluster.store.base import Store
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.gateway import Gateway


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`backbone` is the bare backbone's model id, `fingerprint` its weights', `stock` its files, and packs load it
    `quantised` or not; `limits` are those of a request, `pack` those of a pack; `clock` gives seconds since the
    epoch."""

    store: Store
    gateway: Gateway
    tokeniser: Tokeniser
    shape: ModelShape
    backbone: str
    fingerprint: str
    stock: BackboneFiles
    quantised: bool
    data: Path
    limits: LimitSettings
    pack: Limits
    max_context: int
    clock: Callable[[], float]

    @property
    def files(self) -> Path:
        return self.data / "files"

    def blob(self, file: DataFile) -> Path:
        """Where the content of an uploaded file lies."""
        return self.files / f"{file.id}.jsonl"


def _api(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


def _tenant(request: Request) -> TenantId:
    tenant: TenantId = request.state.tenant
    return tenant


ApiDep = Annotated[Api, Depends(_api)]
TenantDep = Annotated[TenantId, Depends(_tenant)]

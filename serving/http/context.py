"""What the routes stand on: the store, what is known of the backbones, and who is calling."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from fastapi import Depends
from pydantic import JsonValue
from starlette.requests import Request

from polygraft.cluster.folders import Folders
from polygraft.cluster.ground import Ground
from polygraft.cluster.model import Backbone, DataFile, Limits, TenantId
from polygraft.cluster.settings import LimitSettings
from polygraft.cluster.store.base import Store
from polygraft.cluster.told import Told
from polygraft.serving.candidate import Candidate
from polygraft.serving.http.checked import Checked
from polygraft.serving.http.known import Backbones
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from polygraft.serving.http.turns import Turns


class Desk(Protocol):
    """What is known of searches (`tuning/desk.py`, which this package does not import)."""

    def begin(self, body: JsonValue, on: Ground) -> tuple[str, str, dict[str, str]]:
        """Name, body of the study's record, and its files' ids by field. Raises ValueError that names the field."""
        ...

    def told(self, record: str) -> Told: ...


class NoDesk:
    """Where nobody keeps searches."""

    def begin(self, body: JsonValue, on: Ground) -> tuple[str, str, dict[str, str]]:
        raise ValueError("search: this service runs none")

    def told(self, record: str) -> Told:
        return Told()


NO_DESK = NoDesk()


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`limits` are those of a request, `pack` says those of a backbone's packs; `candidate` says what a path would be
    as a backbone, quantised as it says, and raises BackboneError; `metrics_tenants` may read `meters` and what
    `overview` sees; `clock` gives seconds since the epoch; `sized` is a backbone's record with its sizes, and raises
    DoesNotFit."""

    store: Store
    backbones: Backbones
    data: Path
    graft_roots: tuple[Path, ...]
    candidate: Callable[[str, str | None], Candidate]
    limits: LimitSettings
    pack: Callable[[Backbone], Limits]
    clock: Callable[[], float]
    desk: Desk = NO_DESK
    meters: Meters
    overview: Overview
    metrics_tenants: frozenset[TenantId]
    sized: Callable[[Backbone], Backbone] = lambda record: record
    turns: Turns = field(default_factory=Turns)
    checked: Checked = field(default_factory=Checked)

    @property
    def folders(self) -> Folders:
        return Folders(self.data)

    def blob(self, file: DataFile) -> Path:
        """Where the content of an uploaded file lies."""
        return self.folders.files / f"{file.id}.jsonl"


# FastAPI calls plain functions in a thread, and a thread costs more than what these do.
async def _api(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


async def _tenant(request: Request) -> TenantId:
    tenant: TenantId = request.state.tenant
    return tenant


async def _turn(request: Request) -> AsyncIterator[TenantId]:
    tenant, api = await _tenant(request), await _api(request)
    async with api.turns.of(tenant):
        yield tenant


ApiDep = Annotated[Api, Depends(_api)]
TenantDep = Annotated[TenantId, Depends(_tenant)]
# For handlers that are plain functions, which run in a thread: the tenant, in its turn, which ends before the answer is
# sent, since whoever takes it may take long.
TurnDep = Annotated[TenantId, Depends(_turn, scope="function")]

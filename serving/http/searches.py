"""`/v1/searches`: begin, list, look at and cancel searches. What a search is, its `Desk` knows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import JsonValue
from starlette.responses import StreamingResponse

from polygraft.cluster.events import Event
from polygraft.cluster.ground import Ground
from polygraft.cluster.ids import new_study_id
from polygraft.cluster.model import FileId, Search, Study, StudyId, TenantId
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.scores import SCORES, scores_told
from polygraft.cluster.states import SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import OLDEST, Conflict, EntryId, Versioned, Write
from polygraft.cluster.told import JsonObject
from polygraft.grafts.text import jsonl
from polygraft.grafts.text.labelled import Labelled
from polygraft.serving.http.body import read_json
from polygraft.serving.http.context import Api, ApiDep, TenantDep, TurnDep
from polygraft.serving.http.documents import READING, answers
from polygraft.serving.http.errors import ApiError, bad_request, not_found
from polygraft.serving.http.frames import EVENTS, STREAM
from polygraft.serving.http.named import backbone_named
from polygraft.serving.http.needed import told
from polygraft.serving.http.once import once
from polygraft.serving.http.pages import first_of, not_in_list, page
from polygraft.serving.http.schemas import Page, SearchEvent, SearchObject, TrialObject

router = APIRouter(prefix="/v1/searches")
Size = Annotated[int, Query(ge=1, le=100)]
RUNNING = 8  # searches of a tenant at once
EARLIER = 50  # of a tenant's searches that a new one looks at
_POLL_S = 1.0
_SHAPE: dict[str, JsonValue] = {"type": "object"}


@router.post(
    "",
    responses=answers(404, 409, *READING),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _SHAPE}}}},
)
async def create(
    request: Request,
    api: ApiDep,
    tenant: TenantDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> SearchObject:
    """Begin a search; on disk when this answers. The same Idempotency-Key and body again give the first one."""
    return await api.turns.work(tenant, _create, api, tenant, await read_json(request), idempotency_key)


@router.get("", responses=answers(400))
def searches(api: ApiDep, tenant: TurnDep, after: str | None = None, limit: Size = 20) -> Page[SearchObject]:
    """The tenant's searches, newest first."""
    last = None if after is None else api.store.get(keys.search(StudyId(after)))
    if after is not None and (last is None or last.value.tenant != tenant):
        raise not_in_list(after)
    found = api.store.newest(keys.searches_of(tenant), before=last.value if last else None, limit=limit + 1)
    return first_of([_shown(api, one.value) for one in found], limit)


@router.get("/{search}", responses=answers(404))
def search(search: str, api: ApiDep, tenant: TurnDep) -> SearchObject:
    return _shown(api, _find(api, tenant, search).value)


@router.post("/{search}/cancel", responses=answers(400, 404))
def cancel(search: str, api: ApiDep, tenant: TurnDep) -> SearchObject:
    """Ask for the search's end, and that of its trials' jobs. Asking again changes nothing."""
    while True:
        found = _find(api, tenant, search)
        if found.value.cancel_requested:
            return _shown(api, found.value)
        if found.value.state is not SearchState.RUNNING:
            message = f"search {search} is {found.value.state} already; there is nothing to cancel"
            raise bad_request(message, code="search_finished")
        asked = replace(found.value, cancel_requested=True)
        try:
            api.store.commit([Write(found.key, asked, found.version)])
        except Conflict:
            continue
        return _shown(api, asked)


@router.get("/{search}/trials", responses=answers(400, 404))
def trials(search: str, api: ApiDep, tenant: TurnDep, after: str | None = None, limit: Size = 20) -> Page[TrialObject]:
    """Every trial that was asked for, in order."""
    found = _find(api, tenant, search).value
    return page([_trial(found, one) for one in told(api, found).trials], after=after, limit=limit)


@router.get("/{search}/front", responses=answers(404))
def front(search: str, api: ApiDep, tenant: TurnDep) -> Page[TrialObject]:
    """The trials within the limits that no other one of them beats, from the best in the last objective on."""
    found = _find(api, tenant, search).value
    known = told(api, found)
    return Page(data=tuple(_trial(found, known.trials[number]) for number in known.front))


@router.get("/{search}/events", responses={200: {"content": STREAM}, **answers(400, 404)})
async def events(
    search: str,
    api: ApiDep,
    tenant: TenantDep,
    after: str | None = None,
    limit: Size = 20,
    stream: bool = False,
) -> Page[SearchEvent]:
    """What happened, oldest first, from the event called `after` on; as server-sent events until the search is over
    with `stream`, of which `limit` cuts nothing off."""
    found = await api.turns.work(tenant, _find, api, tenant, search)
    entries = await api.turns.work(tenant, _events, api, found.value.id, OLDEST)
    first = page(entries, after=after, limit=limit)
    if not stream:
        return first
    seen = OLDEST if after is None else EntryId(after)
    return StreamingResponse(_stream(api, tenant, found.value.id, seen), media_type=EVENTS)  # type: ignore[return-value]


async def _stream(api: Api, tenant: TenantId, search: StudyId, after: EntryId) -> AsyncIterator[str]:
    """Each look is in the tenant's turn, so that a thousand of them are its own to wait for."""
    while True:
        final = await api.turns.work(tenant, _is_over, api, search)  # looked at before the entries, which end with it
        for event in await api.turns.work(tenant, _events, api, search, after):
            after = EntryId(event.id)
            yield f"data: {event.model_dump_json()}\n\n"
        if final:
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(_POLL_S)


def _is_over(api: Api, search: StudyId) -> bool:
    found = api.store.get(keys.search(search))
    return found is None or found.value.state is not SearchState.RUNNING


def _events(api: Api, search: StudyId, after: EntryId) -> list[SearchEvent]:
    found: list[SearchEvent] = []
    while batch := api.store.read(keys.search_log(search), after):
        for id, entry in batch:
            trial, at = entry.get("trial"), entry.get("at")
            found.append(
                SearchEvent(
                    id=id,
                    created_at=int(at) if isinstance(at, int | float) else 0,
                    message=str(entry.get("message")),
                    trial=trial if isinstance(trial, int) else None,
                )
            )
        after = batch[-1][0]
    return found


def _create(api: Api, tenant: TenantId, body: JsonValue, idempotency_key: str | None) -> SearchObject:
    new = partial(_new, api, tenant, body)
    return _shown(api, once(api.store, Search, f"{tenant}/searches", body, idempotency_key, new))


def _new(api: Api, tenant: TenantId, body: JsonValue) -> tuple[list[Write], list[Event]]:
    wanted = body.get("model") if isinstance(body, dict) else None
    backbone = backbone_named(api, wanted if isinstance(wanted, str) else None)
    supernet = body.get("supernet") if isinstance(body, dict) else None
    if isinstance(body, dict) and isinstance(supernet, str):
        try:
            body = {**body, "supernet": resolve(api.store, tenant, supernet).model}
        except UnknownModel:
            raise not_found("model", supernet, param="supernet") from None
    try:
        ground = Ground(
            backbone=backbone.name,
            shape=backbone.shape,
            quantised=backbone.quantised,
            data=_data(api, tenant, body),
            earlier=_earlier(api, tenant, body),
        )
        name, record, files = api.desk.begin(body, ground)
    except ValueError as error:
        raise bad_request(str(error), param=str(error).partition(":")[0], code="invalid_value") from None
    seen: dict[str, str] = {}
    for field, file in files.items():
        found = api.store.get(keys.file(FileId(file)))
        if found is None or found.value.tenant != tenant:
            raise not_found("file", file, param=field)
        if field == "test_file" and (other := seen.get(found.value.digest)) is not None:
            message = f"test_file: {file} holds what the {other} holds; give examples that the search does not see"
            raise bad_request(message, param="test_file", code="invalid_value")
        seen[found.value.digest] = field
        if field == "validation_file":
            _check_scores(api.blob(found.value), api.desk.told(record).objectives)
    if api.store.count(keys.running_searches_of(tenant)) >= RUNNING:
        message = f"{RUNNING} of your searches are running, which is the limit; wait for one, or cancel it"
        raise ApiError(429, message, code="too_many_searches")
    now, id = api.clock(), new_study_id()
    made = Search(id=id, tenant=tenant, name=name, created_at=now)
    study = Study(id=id, tenant=tenant, name=name, created_at=now, updated_at=now, body=record)
    return [Write(keys.search(id), made, 0), Write(keys.study(id), study, 0)], []


def _data(api: Api, tenant: TenantId, body: JsonValue) -> Path | None:
    """The training file, if the tenant has it."""
    asked = body.get("training_file") if isinstance(body, dict) else None
    found = api.store.get(keys.file(FileId(asked))) if isinstance(asked, str) else None
    path = api.blob(found.value) if found is not None and found.value.tenant == tenant else None
    return path if path is not None and path.is_file() else None


def _earlier(api: Api, tenant: TenantId, body: JsonValue) -> dict[str, str]:
    """The records of the tenant's studies that a new one is to start from: one, or with auto its newest."""
    asked = body.get("warm_start") if isinstance(body, dict) else None
    if not isinstance(asked, str):
        return {}
    if asked == "auto":
        searches = [one.value for one in api.store.newest(keys.searches_of(tenant), limit=EARLIER)]
    else:
        searches = [_find(api, tenant, asked, param="warm_start").value]
    studies = [api.store.get(keys.study(one.id)) for one in searches]
    return {str(one.value.id): one.value.body for one in studies if one is not None}


def _check_scores(validation_file: Path, objectives: Collection[str]) -> None:
    """Raise ApiError 400 where a score is searched for that examples of the file's kind do not tell."""
    wanted = [name for name in objectives if name in SCORES]
    try:
        first = next(jsonl.read_any(validation_file)) if wanted else None
    except (FileNotFoundError, jsonl.DataError):  # which the trials' jobs say with the line
        return
    if first is None:
        return
    labels = isinstance(first, Labelled)
    told = scores_told(choices=not isinstance(first, Labelled) and bool(first.choices), labels=labels)
    for name in wanted:
        if name not in told:
            message = f"objectives: the validation file tells no {name}; it tells {', '.join(sorted(told))}"
            raise bad_request(message, param="objectives", code="invalid_value")


def _find(api: Api, tenant: TenantId, search: str, *, param: str = "id") -> Versioned[Search]:
    found = api.store.get(keys.search(StudyId(search)))
    if found is None or found.value.tenant != tenant:
        raise not_found("search", search, param=param)
    return found


def _trial(search: Search, body: JsonObject) -> TrialObject:
    return TrialObject.model_validate_json(json.dumps({"id": f"{search.id}/{body['number']}", **body}))


def _shown(api: Api, search: Search) -> SearchObject:
    known = told(api, search)
    return SearchObject(
        id=search.id,
        name=search.name,
        created_at=int(search.created_at),
        finished_at=None if search.finished_at is None else int(search.finished_at),
        status="cancelling" if search.cancel_requested and search.state is SearchState.RUNNING else search.state.value,
        note=search.note,
        objectives=known.objectives,
        trials_total=known.trials_total,
        trials=dict(known.states),
        front=known.front,
        finals=known.finals,
        chosen=known.chosen,
        parameters=known.parameters,
        job=known.job,
        shape=known.shape,
    )

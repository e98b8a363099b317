"""`/classify`, as vLLM has it: which label a graft with a classifier gives to texts, and how likely each label is."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex
from typing import Literal

from fastapi import APIRouter, Request

from polygraft.cluster.model import TenantId
from polygraft.cluster.validation import shown
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.description import described
from polygraft.grafts.head import Head
from polygraft.grafts.text.jsonl import DataError
from polygraft.grafts.text.labelled import Labelled
from polygraft.serving.http.body import read_body
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import bad_request, internal
from polygraft.serving.http.generate import tokens_of, unless_gone
from polygraft.serving.http.generations import Prompts, Usage
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import model_named
from polygraft.serving.http.schemas import Body
from polygraft.serving.request import GenerationRequest

router = APIRouter()
FIELD = "input"
_AT_ONCE = 8  # texts of a request that are underway: the queue has room for its tenant's other requests


class ClassifyRequest(Body):
    """A text, or several, each of which is classified as it is alone."""

    model: str
    input: str | Prompts
    user: str | None = None  # a label that answers do not depend on


class Classified(Body):
    """Of the text with this `index`: its likeliest label, and the probabilities of all in the graft's order."""

    index: int
    label: str
    probs: tuple[float, ...]
    num_classes: int


class Classification(Body):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: tuple[Classified, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of a request as an engine reads them, and what their labels are called."""

    backbone: KnownBackbone
    labels: tuple[str, ...]
    wanted: tuple[GenerationRequest, ...]


@router.post("/classify", responses=answers(404, *READING), openapi_extra=json_body(ClassifyRequest))
async def classify(request: Request, api: ApiDep, tenant: TenantDep) -> Classification:
    """Say the labels of texts. A client that hangs up ends its request."""
    body = await read_body(request, ClassifyRequest)
    id = f"classify-{token_hex(12)}"
    texts = await api.turns.work(tenant, _asked, api, tenant, body, id)
    data = await unless_gone(request, _each(api, texts))
    count = sum(len(wanted.prompt_ids) for wanted in texts.wanted)
    return Classification(
        id=id,
        created=int(api.clock()),
        model=body.model,
        data=data,
        usage=Usage(prompt_tokens=count, completion_tokens=0, total_tokens=count),
    )


def _asked(api: Api, tenant: TenantId, body: ClassifyRequest, id: str) -> _Texts:
    """The requests for the engine. Raises ApiError 400 naming the field, 404 for an unknown model."""
    backbone, graft = model_named(api, tenant, body.model)
    if graft is None:
        raise bad_request(
            f"model: {shown(body.model)} is a bare backbone; name a graft with a classifier", param="model"
        )
    if not backbone.shape.causal:
        why = "no replica loads its backbone, an encoder; polygraft classify computes where it runs"
        raise bad_request(f"model: {shown(body.model)} is not served: {why}", param="model")
    try:
        head = described(api.folders.grafts / graft.id).head
    except (FormatError, OSError) as error:
        model_named(api, tenant, body.model)  # a 404 where it was deleted meanwhile
        raise internal("the graft cannot be read", error, code="generation_failed") from None
    if head is None:
        raise bad_request(f"model: {shown(body.model)} has no classifier; it writes", param="model")
    api.backbones.asked(backbone)
    texts = [body.input] if isinstance(body.input, str) else body.input
    several = isinstance(body.input, list)
    wanted = tuple(
        GenerationRequest(
            id=f"{id}-{at}",
            tenant=tenant,
            graft=graft.id,
            prompt_ids=_ids(backbone, head, text, f"{FIELD}.{at}" if several else FIELD, graft.context_length),
            max_tokens=1,
            prefix=graft.context_length,
            classifies=True,
        )
        for at, text in enumerate(texts)
    )
    return _Texts(backbone, head.labels, wanted)


def _ids(backbone: KnownBackbone, head: Head, text: str, field: str, virtual: int) -> tuple[int, ...]:
    try:
        ids = backbone.tokeniser.encode_labelled(Labelled(text, ""), None, last=head.reads_last).ids
    except DataError as error:
        raise bad_request(f"{field}: {error}", param=field) from None
    room = backbone.max_context - virtual - 1
    if len(ids) > room:
        message = f"{field}: {len(ids)} tokens are more than the {room} that the context has room for"
        raise bad_request(message, param=field, code="context_length_exceeded")
    return ids


async def _each(api: Api, texts: _Texts) -> tuple[Classified, ...]:
    """All texts, some side by side; the first that fails ends the others."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def in_its_place(at: int) -> Classified:
        async with places:
            return await _one(api, texts, at)

    tasks = [asyncio.ensure_future(in_its_place(at)) for at in range(len(texts.wanted))]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(api: Api, texts: _Texts, index: int) -> Classified:
    async with aclosing(tokens_of(api, texts.backbone, texts.wanted[index], FIELD)) as said:
        found = (await anext(said)).probabilities
    assert found is not None, "a text that is classified ends with probabilities"
    label = texts.labels[found.index(max(found))]
    return Classified(index=index, label=label, probs=found, num_classes=len(found))

"""`/v1/chat/completions`: one prompt through a graft or the bare backbone, answered whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from math import ceil
from secrets import randbits, token_hex
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from polygraft.cluster.model import Graft, TenantId
from polygraft.cluster.validation import shown
from polygraft.grafts.text.chat import ChatError
from polygraft.serving.gateway import Busy, TooLong, Unavailable
from polygraft.serving.http import frames
from polygraft.serving.http.body import read_body
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import ApiError, as_api_error, bad_request, internal, unavailable
from polygraft.serving.http.frames import DONE, Frames
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import model_named
from polygraft.serving.http.schemas import AnswerMessage, ChatChoice, ChatCompletion, ChatCompletionRequest
from polygraft.serving.http.transcript import Transcript
from polygraft.serving.messages import StepTokens
from polygraft.serving.sequence import GenerationRequest

router = APIRouter(prefix="/v1/chat/completions")
EVENTS = "text/event-stream"
R = TypeVar("R")


@router.post(
    "",
    response_model=ChatCompletion,
    responses={
        200: {"content": {EVENTS: {"schema": {"type": "string"}}}, "description": "The answer, whole or as a stream."},
        **answers(404, *READING),
    },
    openapi_extra=json_body(ChatCompletionRequest),
)
async def complete(request: Request, api: ApiDep, tenant: TenantDep) -> Response:
    """Answer a conversation. A client that hangs up ends its generation."""
    body = await read_body(request, ChatCompletionRequest)
    backbone, wanted = await api.turns.work(tenant, _generation, api, tenant, body)
    tokens = _tokens(api, backbone, wanted)
    first = await _unless_gone(request, _first(tokens))  # so that a refusal still has its status
    transcript = Transcript(backbone.tokeniser, wanted.prompt_ids, body.stops)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        shape = Frames(
            id=wanted.id,
            created=int(api.clock()),
            model=body.model,
            fingerprint=_fingerprint(backbone),
            with_usage=with_usage,
        )
        return StreamingResponse(_stream(shape, transcript, first, tokens), media_type=EVENTS)
    text = await _unless_gone(request, _whole(transcript, first, tokens))
    assert transcript.finish_reason is not None
    answer = ChatCompletion(
        id=wanted.id,
        created=int(api.clock()),
        model=body.model,
        choices=(ChatChoice(index=0, message=AnswerMessage(content=text), finish_reason=transcript.finish_reason),),
        usage=transcript.usage,
        system_fingerprint=_fingerprint(backbone),
    )
    return JSONResponse(answer.model_dump(mode="json"))


def _generation(api: Api, tenant: TenantId, body: ChatCompletionRequest) -> tuple[KnownBackbone, GenerationRequest]:
    """The request for the engine of a backbone. Raises ApiError 400 naming the field, 404 for an unknown model."""
    if refused := body.unsupported():
        raise bad_request(f"{refused[0]}: {shown(refused[1])} is not supported; leave the field out", param=refused[0])
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_completion_tokens: differs from max_tokens; give one", param="max_completion_tokens")
    if "" in body.stops:
        raise bad_request("stop: '' would stop before the first character; leave it out", param="stop")
    backbone, graft = model_named(api, tenant, body.model)
    try:
        prompt = backbone.tokeniser.encode_chat([one.message for one in body.messages], add_generation_prompt=True)
    except ChatError as error:
        raise bad_request(f"messages: {error}", param="messages") from None
    api.backbones.asked(backbone)
    return backbone, GenerationRequest(
        id=f"chatcmpl-{token_hex(12)}",
        tenant=tenant,
        graft=graft.id if graft else None,
        prompt_ids=prompt,
        max_tokens=_max_tokens(backbone.max_context, body, len(prompt), graft),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=randbits(63) if body.seed is None else body.seed,
        eos_ids=backbone.tokeniser.eos_ids,
        prefix=graft.context_length if graft else 0,
    )


def _max_tokens(context: int, body: ChatCompletionRequest, prompt: int, graft: Graft | None) -> int:
    """How many tokens the answer may have: what was asked, or all the context has room for."""
    prefix = graft.context_length if graft else 0
    room = context - prompt - prefix
    asked = body.max_completion_tokens or body.max_tokens
    if room < 1 or (asked or 1) > room:
        virtual = f" and {prefix} virtual tokens of the graft" if prefix else ""
        raise bad_request(
            f"messages: {prompt} tokens{virtual} plus {asked or 1} to generate exceed the context of {context}",
            param="messages" if room < 1 else "max_tokens" if body.max_tokens else "max_completion_tokens",
            code="context_length_exceeded",
        )
    return asked or room


async def _tokens(api: Api, backbone: KnownBackbone, wanted: GenerationRequest) -> AsyncGenerator[StepTokens, None]:
    """The gateway's tokens, its refusals and failures as answers."""
    try:
        gateway = await api.backbones.started(backbone)
        async with aclosing(gateway.generate(wanted)) as stream:
            async for tokens in stream:
                if (failure := _failure(tokens)) is not None:
                    raise failure
                yield tokens
    except Busy as error:
        seconds = ceil(error.retry_after_s)
        headers = {"Retry-After": f"{seconds}"}
        raise ApiError(429, f"{error}; try again in {seconds} s", code="overloaded", headers=headers) from None
    except TooLong as error:
        raise bad_request(f"messages: {error}", param="messages", code="context_length_exceeded") from None
    except Unavailable as error:
        raise unavailable(f"{error}; try again") from None


def _failure(tokens: StepTokens) -> ApiError | None:
    """The answer when a generation failed, by who can mend it, or was broken off."""
    match tokens.finish_reason, tokens.code:
        case "error", "out_of_memory":
            return unavailable(f"{tokens.request}: {tokens.error}; try again, or with a shorter prompt")
        case "error", None:
            return internal("the generation failed", f"{tokens.request}: {tokens.error}", code="generation_failed")
        case "error", code:
            return bad_request(f"messages: {tokens.error}", param="messages", code=code)
        case "cancelled", _:
            return unavailable("the generation was broken off by the service; try again")
        case _:
            return None


async def _first(tokens: AsyncGenerator[StepTokens, None]) -> StepTokens:
    return await anext(tokens)


async def _whole(transcript: Transcript, first: StepTokens, rest: AsyncGenerator[StepTokens, None]) -> str:
    async with aclosing(rest):
        pieces = [transcript.feed(first)]
        while transcript.finish_reason is None:
            pieces.append(transcript.feed(await anext(rest)))
    return "".join(pieces)


async def _stream(
    shape: Frames, transcript: Transcript, first: StepTokens, rest: AsyncGenerator[StepTokens, None]
) -> AsyncGenerator[str, None]:
    async with aclosing(rest):
        yield shape.role()
        try:
            piece = transcript.feed(first)
            while True:
                if piece:
                    yield shape.text(piece)
                if transcript.finish_reason is not None:
                    break
                piece = transcript.feed(await anext(rest))
        except Exception as error:
            yield frames.failure(as_api_error(error))
            return
        yield shape.end(transcript.finish_reason)
        if shape.with_usage:
            yield shape.usage(transcript.usage)
        yield DONE


async def _unless_gone(request: Request, work: Coroutine[None, None, R]) -> R:
    """The result of `work`, which is cancelled when the client hangs up first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", code="client_gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fingerprint(backbone: KnownBackbone) -> str:
    return f"fp_{backbone.fingerprint[:12]}"

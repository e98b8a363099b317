"""`/v1/chat/completions`: one prompt through a graft or the bare backbone, answered whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from polygraft.cluster.model import TenantId
from polygraft.grafts.text.chat import ChatError
from polygraft.serving.http import frames
from polygraft.serving.http.body import work_on
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import as_api_error, bad_request
from polygraft.serving.http.frames import DONE, EVENTS, STREAM, Frames
from polygraft.serving.http.generate import Asker, Said, first, unless_gone
from polygraft.serving.http.generations import AnswerMessage, ChatChoice, ChatCompletion, ChatCompletionRequest
from polygraft.serving.http.transcript import Transcript
from polygraft.serving.request import GenerationRequest

router = APIRouter(prefix="/v1/chat/completions")


@router.post(
    "",
    response_model=ChatCompletion,
    responses={
        200: {"content": STREAM, "description": "The answer, whole or as a stream."},
        **answers(404, *READING),
    },
    openapi_extra=json_body(ChatCompletionRequest),
)
async def complete(request: Request, api: ApiDep, tenant: TenantDep) -> Response:
    """Answer a conversation. A client that hangs up ends its generation."""
    asked = api.meters.now()
    asker, wanted = await work_on(request, ChatCompletionRequest, lambda body: _asked(api, tenant, body, asked))
    body = asker.body
    transcript = asker.transcript(wanted)
    answer = asker.said(wanted, transcript)
    begun = await unless_gone(request, first(answer))  # so that a refusal still has its status
    if body.stream:
        shape = Frames(
            kind="chat.completion.chunk",
            id=wanted.id,
            created=int(api.clock()),
            model=body.model,
            fingerprint=asker.fingerprint,
            with_usage=body.with_usage,
        )
        return StreamingResponse(_stream(shape, transcript, begun, answer), media_type=EVENTS)
    text = await unless_gone(request, _whole(begun, answer))
    assert transcript.finish_reason is not None
    completion = ChatCompletion(
        id=wanted.id,
        created=int(api.clock()),
        model=body.model,
        choices=(ChatChoice(index=0, message=AnswerMessage(content=text), finish_reason=transcript.finish_reason),),
        usage=transcript.usage,
        system_fingerprint=asker.fingerprint,
    )
    return JSONResponse(completion.model_dump(mode="json"))


def _asked(api: Api, tenant: TenantId, body: ChatCompletionRequest, asked: float) -> tuple[Asker, GenerationRequest]:
    """The request for the engine. Raises ApiError 400 naming the field, 404 for an unknown model."""
    asker = Asker.of(api, tenant, body, "messages", asked)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_completion_tokens: differs from max_tokens; give one", param="max_completion_tokens")
    try:
        prompt = asker.backbone.tokeniser.encode_chat(
            [one.message for one in body.messages], add_generation_prompt=True
        )
    except ChatError as error:
        raise bad_request(f"messages: {error}", param="messages") from None
    most = ("max_tokens" if body.max_tokens else "max_completion_tokens", body.max_completion_tokens or body.max_tokens)
    return asker, asker.request(f"chatcmpl-{token_hex(12)}", prompt, most)


async def _whole(begun: Said, rest: AsyncGenerator[Said, None]) -> str:
    async with aclosing(rest):
        return begun[0] + "".join([piece async for piece, _ in rest])


async def _stream(
    shape: Frames, transcript: Transcript, begun: Said, rest: AsyncGenerator[Said, None]
) -> AsyncGenerator[str, None]:
    """The frames that are there at the same time go as one: each that is sent passes two processes more."""
    async with aclosing(rest):
        head, (piece, reason) = shape.role(), begun
        try:
            while reason is None:
                if head or piece:
                    yield head + shape.said(piece)
                head, (piece, reason) = "", await anext(rest)
        except Exception as error:
            yield frames.failure(as_api_error(error))
            return
        await rest.aclose()
        usage = shape.usage(transcript.usage) if shape.with_usage else ""
        yield head + shape.said(piece) + shape.end(reason) + usage + DONE

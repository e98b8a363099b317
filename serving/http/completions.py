"""`/v1/completions`: texts that a graft or the bare backbone goes on with, answered whole or as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from polygraft.cluster.model import TenantId
from polygraft.grafts.text.chat import ChatError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.http import frames
from polygraft.serving.http.body import work_on
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import as_api_error, bad_request
from polygraft.serving.http.frames import DONE, EVENTS, STREAM, Frames
from polygraft.serving.http.generate import Asker, Said, first, unless_gone
from polygraft.serving.http.generations import Completion, CompletionChoice, CompletionRequest, Usage
from polygraft.serving.http.transcript import Transcript
from polygraft.serving.request import GenerationRequest

router = APIRouter(prefix="/v1/completions")
Piece = tuple[int, Said]  # of the text that goes on from the prompt of that index


@dataclass(frozen=True, slots=True)
class _Texts:
    """All texts of a request, by the index of their prompts."""

    asker: Asker
    wanted: tuple[GenerationRequest, ...]
    transcripts: tuple[Transcript, ...]

    def said(self) -> AsyncGenerator[Piece, None]:
        return _together(list(map(self.asker.said, self.wanted, self.transcripts)))

    @property
    def usage(self) -> Usage:
        """Of all together."""
        return Usage.of(*map(sum, zip(*(transcript.counts for transcript in self.transcripts), strict=True)))


@router.post(
    "",
    response_model=Completion,
    responses={
        200: {"content": STREAM, "description": "The texts, whole or as a stream."},
        **answers(404, *READING),
    },
    openapi_extra=json_body(CompletionRequest),
)
async def complete(request: Request, api: ApiDep, tenant: TenantDep) -> Response:
    """Go on with a text, or with several. A client that hangs up ends its generations."""
    asked = api.meters.now()
    id = f"cmpl-{token_hex(12)}"
    texts = await work_on(request, CompletionRequest, lambda body: _asked(api, tenant, body, id, asked))
    body = texts.asker.body
    answer = texts.said()
    begun = await unless_gone(request, first(answer))  # so that a refusal still has its status
    created = int(api.clock())
    if body.stream:
        shape = Frames(
            kind="text_completion",
            id=id,
            created=created,
            model=body.model,
            fingerprint=texts.asker.fingerprint,
            with_usage=body.with_usage,
        )
        return StreamingResponse(_stream(shape, texts, begun, answer), media_type=EVENTS)
    choices = await unless_gone(request, _whole(len(texts.wanted), begun, answer))
    completion = Completion(
        id=id,
        created=created,
        model=body.model,
        choices=choices,
        usage=texts.usage,
        system_fingerprint=texts.asker.fingerprint,
    )
    return JSONResponse(completion.model_dump(mode="json"))


def _asked(api: Api, tenant: TenantId, body: CompletionRequest, id: str, asked: float) -> _Texts:
    """The requests for the engine. Raises ApiError 400 naming the field, 404 for an unknown model."""
    asker = Asker.of(api, tenant, body, "prompt", asked)
    prompts = [_ids(asker.backbone.tokeniser, prompt, body.add_special_tokens is not False) for prompt in body.prompts]
    several = len(prompts) > 1
    most = ("max_tokens", body.max_tokens)
    wanted = tuple(asker.request(f"{id}-{at}" if several else id, ids, most) for at, ids in enumerate(prompts))
    return _Texts(asker, wanted, tuple(map(asker.transcript, wanted)))


def _ids(tokeniser: Tokeniser, prompt: str | list[int], special: bool) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    try:
        ids = tokeniser.encode_text(prompt, special=special)
    except ChatError as error:
        raise bad_request(f"prompt: {error}", param="prompt") from None
    if not ids:
        raise bad_request("prompt: '' has no token to go on from", param="prompt")
    return ids


async def _together(texts: Sequence[AsyncGenerator[Said, None]]) -> AsyncGenerator[Piece, None]:
    """What all of them say, as it comes; the first to raise ends all."""
    arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def follow(index: int, text: AsyncGenerator[Said, None]) -> None:
        try:
            async with aclosing(text):
                async for one in text:
                    arrived.put_nowait((index, one))
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(follow(index, text)) for index, text in enumerate(texts)]
    left = len(texts)
    try:
        while left:
            match await arrived.get():
                case Exception() as error:
                    raise error
                case index, one:
                    left -= _ends((index, one))
                    yield index, one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(count: int, begun: Piece, rest: AsyncGenerator[Piece, None]) -> tuple[CompletionChoice, ...]:
    pieces: list[list[Said]] = [[] for _ in range(count)]
    pieces[begun[0]].append(begun[1])
    async with aclosing(rest):
        async for index, one in rest:
            pieces[index].append(one)
    return tuple(
        CompletionChoice(index=index, text="".join(piece for piece, _ in said), finish_reason=said[-1][1])  # type: ignore[arg-type]
        for index, said in enumerate(pieces)
    )


async def _stream(
    shape: Frames, texts: _Texts, begun: Piece, rest: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    """The frames that are there at the same time go as one: each that is sent passes two processes more."""
    async with aclosing(rest):
        left, piece = len(texts.wanted), begun
        try:
            while (left := left - _ends(piece)) > 0:
                if said := _frames(shape, piece):
                    yield said
                piece = await anext(rest)
        except Exception as error:
            yield frames.failure(as_api_error(error))
            return
        await rest.aclose()
        yield _frames(shape, piece) + (shape.usage(texts.usage) if shape.with_usage else "") + DONE


def _ends(piece: Piece) -> bool:
    """Whether its text is over."""
    return piece[1][1] is not None


def _frames(shape: Frames, piece: Piece) -> str:
    index, (text, reason) = piece
    return shape.said(text, index) + ("" if reason is None else shape.end(reason, index))

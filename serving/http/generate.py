"""From a checked body and a prompt to tokens: what chat and text completions have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from math import ceil
from secrets import randbits
from typing import TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from polygraft.cluster.model import Graft, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.validation import shown
from polygraft.serving.gateway import Busy, TooLong, Unavailable
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import ApiError, bad_request, internal, unavailable
from polygraft.serving.http.generations import FinishReason, Generation
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.meters import Finish
from polygraft.serving.http.named import model_named
from polygraft.serving.http.transcript import Transcript
from polygraft.serving.messages import StepTokens
from polygraft.serving.request import GenerationRequest

R = TypeVar("R")
Said = tuple[str, FinishReason | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks for generations and what of: the `field` of its request holds the prompts, and the backbone answers them
    with the `graft` (None: bare). It `asked` at that time of the meters."""

    api: Api
    tenant: TenantId
    body: Generation
    field: str
    backbone: KnownBackbone
    asked: float
    graft: Graft | None

    @staticmethod
    def of(api: Api, tenant: TenantId, body: Generation, field: str, asked: float) -> Asker:
        """Raises ApiError 400 naming the field, 404 for an unknown model."""
        if refused := body.unsupported():
            message = f"{refused[0]}: {shown(refused[1])} is not supported; leave the field out"
            raise bad_request(message, param=refused[0])
        if "" in body.stops:
            raise bad_request("stop: '' would stop before the first character; leave it out", param="stop")
        backbone, graft = model_named(api, tenant, body.model)
        if not backbone.shape.causal:
            message = f"model: {shown(body.model)} classifies texts and writes none: {backbone.shape.sees}"
            raise bad_request(message, param="model")
        api.backbones.asked(backbone)
        return Asker(api=api, tenant=tenant, body=body, field=field, backbone=backbone, asked=asked, graft=graft)

    @property
    def fingerprint(self) -> str:
        """What an answer says of the model that gave it."""
        return f"fp_{self.backbone.fingerprint[:12]}"

    def request(self, id: str, prompt: tuple[int, ...], most: tuple[str, int | None]) -> GenerationRequest:
        """For the engine; `most` is the field that bounds the answer, and what it holds. Raises ApiError 400."""
        body = self.body
        limit = self._limit(len(prompt), *most)
        if (body.min_tokens or 0) > limit:
            raise bad_request(
                f"min_tokens: {body.min_tokens} is more than the {limit} that the answer may have", param="min_tokens"
            )
        return GenerationRequest(
            id=id,
            tenant=self.tenant,
            graft=self.graft.id if self.graft else None,
            prompt_ids=prompt,
            max_tokens=limit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            seed=randbits(63) if body.seed is None else body.seed,
            eos_ids=self.backbone.tokeniser.eos_ids,
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            prefix=self.graft.context_length if self.graft else 0,
        )

    def transcript(self, request: GenerationRequest) -> Transcript:
        return Transcript(self.backbone.tokeniser, request.prompt_ids, self.body.stops, request.min_tokens)

    async def said(self, wanted: GenerationRequest, transcript: Transcript) -> AsyncGenerator[Said, None]:
        """What each token made certain of the text, maybe nothing, and at the end why it ends. Raises ApiError."""
        meter = self.api.meters.begin(
            self.backbone.name, self.asked, prompt_tokens=len(wanted.prompt_ids), max_tokens=wanted.max_tokens
        )
        tokens = tokens_of(self.api, self.backbone, wanted, self.field)
        reason: Finish = "abort"
        try:
            async with aclosing(tokens):
                while transcript.finish_reason is None:
                    step = await anext(tokens)
                    meter.token()
                    piece = transcript.feed(step)
                    reason = transcript.finish_reason or reason
                    yield piece, transcript.finish_reason
        except Exception:
            reason = "error"
            raise
        finally:
            meter.over(reason)

    def _limit(self, prompt: int, field: str, asked: int | None) -> int:
        """How many tokens the answer may have: what was asked, or all the context has room for."""
        prefix = self.graft.context_length if self.graft else 0
        room = self.backbone.max_context - prompt - prefix
        if room < 1 or (asked or 1) > room:
            virtual = f" and {prefix} virtual tokens of the graft" if prefix else ""
            raise bad_request(
                f"{self.field}: {prompt} tokens{virtual} plus {asked or 1} to generate exceed the context of "
                f"{self.backbone.max_context}",
                param=self.field if room < 1 else field,
                code="context_length_exceeded",
            )
        return asked or room


async def tokens_of(
    api: Api, backbone: KnownBackbone, wanted: GenerationRequest, field: str
) -> AsyncGenerator[StepTokens, None]:
    """What the gateway says of a request whose prompt stood in `field`, its refusals and failures as answers. Raises
    ApiError."""
    try:
        async with (
            api.backbones.answering(backbone) as gateway,
            aclosing(gateway.generate(wanted)) as stream,
        ):
            async for tokens in stream:
                if tokens.finish_reason == "error" and await run_in_threadpool(_deleted, api, wanted):
                    raise ApiError(404, "model: it was deleted meanwhile", param="model", code="model_not_found")
                if (failure := _failure(tokens, field)) is not None:
                    raise failure
                yield tokens
    except Busy as error:
        seconds = ceil(error.retry_after_s)
        headers = {"Retry-After": f"{seconds}"}
        raise ApiError(429, f"{error}; try again in {seconds} s", code="overloaded", headers=headers) from None
    except TooLong as error:
        raise bad_request(f"{field}: {error}", param=field, code="context_length_exceeded") from None
    except Unavailable as error:
        raise unavailable(f"{error}; try again") from None


def _deleted(api: Api, wanted: GenerationRequest) -> bool:
    """Whether the graft is none of the tenant's any more: a request that looked it up just before finds no files."""
    grafts = api.store.scan(keys.grafts(wanted.tenant))
    return wanted.graft is not None and all(one.value.id != wanted.graft for one in grafts)


def _failure(tokens: StepTokens, field: str) -> ApiError | None:
    """The answer when a generation failed, by who can mend it, or was broken off."""
    match tokens.finish_reason, tokens.code:
        case "error", "out_of_memory":
            return unavailable(f"{tokens.request}: {tokens.error}; try again, or with a shorter prompt")
        case "error", None:
            return internal("the generation failed", f"{tokens.request}: {tokens.error}", code="generation_failed")
        case "error", "wrong_model":
            return bad_request(f"model: {tokens.error}", param="model", code="wrong_model")
        case "error", code:
            return bad_request(f"{field}: {tokens.error}", param=field, code=code)
        case "cancelled", _:
            return unavailable("the generation was broken off by the service; try again")
        case _:
            return None


async def first(stream: AsyncGenerator[R, None]) -> R:
    """For a stream that has something."""
    return await anext(stream)


async def unless_gone(request: Request, work: Coroutine[None, None, R]) -> R:
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

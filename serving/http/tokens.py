"""`/tokenize` and `/detokenize`, as vLLM has them: what the service makes of a text or a conversation, and back."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from polygraft.cluster.model import TenantId
from polygraft.grafts.text.chat import ChatError
from polygraft.grafts.text.message import ChatMessage
from polygraft.serving.http.body import work_on
from polygraft.serving.http.context import Api, ApiDep, TenantDep
from polygraft.serving.http.documents import READING, answers, json_body
from polygraft.serving.http.errors import bad_request
from polygraft.serving.http.generations import TokenIds
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.http.named import backbone_named, model_named
from polygraft.serving.http.schemas import Body

router = APIRouter()


class TokenizeRequest(Body):
    """A `prompt`, or the `messages` of a conversation; without a model the service's own backbone's."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(default=None, description="of a prompt: what the tokenizer puts around it")
    add_generation_prompt: bool = Field(default=True, description="of messages: what begins the answer")
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: the chat template writes those of messages; leave the field out")
        return self


class TokenizeAnswer(Body):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds


class DetokenizeAnswer(Body):
    prompt: str


@router.post("/tokenize", responses=answers(404, *READING), openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request, api: ApiDep, tenant: TenantDep) -> TokenizeAnswer:
    """The tokens of a text, or of a conversation as chat makes them."""
    return await work_on(request, TokenizeRequest, lambda body: _tokenized(api, tenant, body))


@router.post("/detokenize", responses=answers(404, *READING), openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request, api: ApiDep, tenant: TenantDep) -> DetokenizeAnswer:
    """The text of tokens, special ones among them."""
    return await work_on(request, DetokenizeRequest, lambda body: _detokenized(api, tenant, body))


def _tokenized(api: Api, tenant: TenantId, body: TokenizeRequest) -> TokenizeAnswer:
    backbone = _known(api, tenant, body.model)
    tokeniser = backbone.tokeniser
    try:
        if body.messages is not None:
            messages = [one.message for one in body.messages]
            ids = tokeniser.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
        else:
            assert body.prompt is not None
            ids = tokeniser.encode_text(body.prompt, special=body.add_special_tokens is not False)
    except ChatError as error:
        field = "prompt" if body.messages is None else "messages"
        raise bad_request(f"{field}: {error}", param=field) from None
    written = tuple(tokeniser.token(id) or "" for id in ids) if body.return_token_strs else None
    return TokenizeAnswer(count=len(ids), max_model_len=backbone.max_context, tokens=ids, token_strs=written)


def _detokenized(api: Api, tenant: TenantId, body: DetokenizeRequest) -> DetokenizeAnswer:
    tokeniser = _known(api, tenant, body.model).tokeniser
    wrong = next((at for at, id in enumerate(body.tokens) if tokeniser.token(id) is None), None)
    if wrong is not None:
        message = f"tokens.{wrong}: the tokenizer has no token {body.tokens[wrong]}"
        raise bad_request(message, param=f"tokens.{wrong}", code="unknown_token")
    return DetokenizeAnswer(prompt=tokeniser.decode(body.tokens, special=True))


def _known(api: Api, tenant: TenantId, model: str | None) -> KnownBackbone:
    """That of a model that the tenant can ask; for None the service's own. Raises ApiError."""
    return backbone_named(api, None) if model is None else model_named(api, tenant, model)[0]

"""Bodies of chat and text completions: OpenAI's fields, and vLLM's by which it and its clients go beyond them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue

from polygraft.grafts.text.message import ChatMessage
from polygraft.serving.http.schemas import Body

_INT64 = 1 << 63
_MOST_PROMPTS = 128  # of one request; each is a stream
_MOST_IDS = 1 << 20
_DEFAULT_TOKENS = 16  # of a text completion that does not say how many, as OpenAI has it

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=_MOST_IDS, fail_fast=True)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS, fail_fast=True)]
PromptsOfIds = Annotated[list[TokenIds], Field(min_length=1, max_length=_MOST_PROMPTS, fail_fast=True)]
FinishReason = Literal["stop", "length"]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding against traffic analysis; none is ever added


def _with_neutral(schema: dict[str, Any], model: type[Generation]) -> None:
    """The values that the fields of NEUTRAL take, in the model's schema."""
    for name, neutral in model.NEUTRAL.items():
        schema["properties"][name] |= {"enum": [*neutral, None]}


class Generation(Body):
    """What both forms can ask. Fields in NEUTRAL are accepted only where they change nothing."""

    model_config = ConfigDict(json_schema_extra=_with_neutral)
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # a label that answers do not depend on
    # vLLM's.
    ignore_eos: bool | None = False
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    min_tokens: int | None = Field(default=None, ge=0, lt=_INT64)
    top_k: int | None = Field(default=None, ge=-1, lt=_INT64, description="0 and -1 leave all tokens")
    # Not supported here.
    frequency_penalty: JsonValue = None
    include_stop_str_in_output: JsonValue = None
    length_penalty: JsonValue = None
    logit_bias: JsonValue = None
    logprobs: JsonValue = None
    n: JsonValue = None
    presence_penalty: JsonValue = None
    repetition_penalty: JsonValue = None
    skip_special_tokens: JsonValue = None
    stop_token_ids: JsonValue = None

    NEUTRAL: ClassVar[dict[str, tuple[JsonValue, ...]]] = {
        "frequency_penalty": (0,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "n": (1,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "skip_special_tokens": (True,),
        "stop_token_ids": ([],),
    }

    def unsupported(self) -> tuple[str, JsonValue] | None:
        """The first field, with its value, that asks for something this service does not do."""
        for name, neutral in self.NEUTRAL.items():
            value: JsonValue = getattr(self, name)
            if value is not None and not any(
                value is allowed or (value == allowed and type(value) is not bool) for allowed in neutral
            ):
                return name, value
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def with_usage(self) -> bool:
        """Whether its stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(Generation):
    """Everything the stock client can send."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # Labels that answers do not depend on.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: JsonValue = None
    safety_identifier: str | None = None
    # Not supported here.
    audio: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    grafts: JsonValue = None
    modalities: JsonValue = None
    moderation: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prediction: JsonValue = None
    reasoning_effort: JsonValue = None
    response_format: JsonValue = None
    service_tier: JsonValue = None
    store: JsonValue = None
    tool_choice: JsonValue = None
    tools: JsonValue = None
    top_logprobs: JsonValue = None
    verbosity: JsonValue = None
    web_search_options: JsonValue = None

    NEUTRAL: ClassVar[dict[str, tuple[JsonValue, ...]]] = {
        **Generation.NEUTRAL,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "grafts": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }


class CompletionRequest(Generation):
    """A text to go on with, or several, each as text or as token ids; every prompt is answered as it is alone."""

    prompt: str | Prompts | TokenIds | PromptsOfIds
    max_tokens: int | None = Field(default=_DEFAULT_TOKENS, ge=1)
    add_special_tokens: bool | None = Field(default=True, description="what the tokenizer puts around a text")
    # Not supported here.
    best_of: JsonValue = None
    echo: JsonValue = None
    grafts: JsonValue = None
    suffix: JsonValue = None

    NEUTRAL: ClassVar[dict[str, tuple[JsonValue, ...]]] = {
        **Generation.NEUTRAL,
        "best_of": (1,),
        "echo": (False,),
        "grafts": ([],),
        "logprobs": (),
        "suffix": ("",),
    }

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, by their index in the answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        one = isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]


class PromptTokensDetails(Body):
    """`cached_tokens`: those that the tenant's requests to this model had begun with before, and were not computed."""

    cached_tokens: int


class Usage(Body):
    """Tokens of prompts and answers; `prompt_tokens_details` are those of texts that are written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @staticmethod
    def of(prompt: int, answer: int, cached: int) -> Usage:
        details = PromptTokensDetails(cached_tokens=cached)
        return Usage(
            prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer, prompt_tokens_details=details
        )


class AnswerMessage(Body):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Body):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(Body):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    system_fingerprint: str
    service_tier: None = None


class CompletionChoice(Body):
    """`index` is that of its prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class Completion(Body):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    system_fingerprint: str

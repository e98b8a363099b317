"""Bodies of the OpenAI API as this service reads and writes them; requests refuse fields they do not know."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from polygraft.grafts.text.message import ChatMessage

_INT64 = 1 << 63
T = TypeVar("T")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ErrorObject(_Body):
    """OpenAI's error object; `param` names the field of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Body):
    error: ErrorObject


class Health(_Body):
    status: Literal["ok"] = "ok"


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding against traffic analysis; none is ever added


def _with_neutral(schema: dict[str, Any], model: type[ChatCompletionRequest]) -> None:
    """The values that the fields of NEUTRAL take, in the model's schema."""
    for name, neutral in model.NEUTRAL.items():
        schema["properties"][name] |= {"enum": [*neutral, None]}


class ChatCompletionRequest(_Body):
    """Everything the stock client can send. Fields in NEUTRAL are accepted only where they change nothing."""

    model_config = ConfigDict(json_schema_extra=_with_neutral)
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Labels that answers do not depend on.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: JsonValue = None
    safety_identifier: str | None = None
    user: str | None = None
    # Not supported here.
    audio: JsonValue = None
    frequency_penalty: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    grafts: JsonValue = None
    logit_bias: JsonValue = None
    logprobs: JsonValue = None
    modalities: JsonValue = None
    moderation: JsonValue = None
    n: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prediction: JsonValue = None
    presence_penalty: JsonValue = None
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
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "grafts": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "modalities": (["text"],),
        "moderation": (),
        "n": (1,),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "presence_penalty": (0,),
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


class Usage(_Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(_Body):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Body):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Body):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    system_fingerprint: str
    service_tier: None = None


class FileObject(_Body):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class Deleted(_Body):
    id: str
    object: str
    deleted: Literal[True] = True


class ModelObject(_Body):
    """As vLLM reports LoRA modules: `root` is the weights that answer, `parent` the backbone they were trained on."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None = None


class GraftObject(_Body):
    """A version of a graft. `current` says that its name alone means it; `backbone` is null for a graft of another
    backbone than the service has now; `graft` is the digest that its files are kept under."""

    id: str
    object: Literal["graft"] = "graft"
    name: str
    version: int
    current: bool
    graft: str
    method: str
    backbone: str | None
    backbone_fingerprint: str
    parameters: int
    bytes: int
    context_length: int
    created_at: int
    job: str | None


class GraftImport(_Body):
    """Body of POST /v1/grafts/import; `path` is a folder that the service can see."""

    path: str = Field(min_length=1, max_length=4096)
    name: str
    promote: bool = False


class JobErrorObject(_Body):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(_Body):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    hyperparameters: dict[str, JsonValue]
    method: dict[str, JsonValue]
    training_file: str
    validation_file: str | None
    result_files: tuple[str, ...] = ()
    trained_tokens: int | None
    seed: int
    error: JobErrorObject | None
    estimated_finish: None = None
    integrations: tuple[str, ...] = ()
    metadata: dict[str, str]
    # Ours.
    suffix: str | None
    graft: str | None
    pack: str | None
    parameters: int | None
    step: int
    steps_total: int | None
    loss_before: float | None
    loss_after: float | None
    reason: str | None
    owner: str | None
    lease_until: int | None
    priority: int
    devices: int


class DryRunFile(_Body):
    """Counts over the examples that were read, all of them if `complete`; tokens before the cut, and those cut off."""

    id: str
    examples: int
    complete: bool
    tokens: int
    trained_tokens: int
    longest: int
    cut: int
    cut_tokens: int
    cut_trained_tokens: int
    warning: str | None


class DryRun(_Body):
    """What a job would be."""

    object: Literal["fine_tuning.dry_run"] = "fine_tuning.dry_run"
    model: str
    peft: str
    parameters: int
    learning_rate: float | None
    max_length: int | None
    steps: int | None
    training_file: DryRunFile
    validation_file: DryRunFile | None


class Renewal(_Body):
    """Body of POST /v1/fine_tuning/jobs/{id}/renew."""

    lease_s: float = Field(ge=1, le=86400, allow_inf_nan=False)


class FineTuningJobEvent(_Body):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue]


class Page(_Body, Generic[T]):
    """A list answer; `last_id` is the `after` of the next page."""

    object: Literal["list"] = "list"
    data: tuple[T, ...]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

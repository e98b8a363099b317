"""Bodies of the OpenAI API as this service reads and writes them; requests refuse fields they do not know."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from polygraft.grafts.methods.compressed.quantisation import PATTERN

T = TypeVar("T")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ErrorObject(Body):
    """OpenAI's error object; `param` names the field of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Body):
    error: ErrorObject


class Health(Body):
    status: Literal["ok"] = "ok"


class FileObject(Body):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class Deleted(Body):
    id: str
    object: str
    deleted: Literal[True] = True


class ModelObject(Body):
    """As vLLM reports LoRA modules: `root` is the weights that answer, `parent` the backbone they were trained on."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None = None


class GraftObject(Body):
    """A version of a graft. `current` says that its name alone means it; `backbone` is null for a graft of another
    backbone than those that the service has now; `graft` is the digest that its files are kept under."""

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


class GraftImport(Body):
    """Body of POST /v1/grafts/import; `path` is a folder that the service can see."""

    path: str = Field(min_length=1, max_length=4096)
    name: str
    promote: bool = False
    backbone: str | None = Field(default=None, description="the one it is for; the service's own where not given")


class BackboneObject(Body):
    """A frozen model that jobs and requests may name. Where its files lie (`path`) is for the operator alone.
    `context_length` null: no limit. `state`: whether replicas hold it, or will because somebody asked it."""

    id: str
    object: Literal["backbone"] = "backbone"
    default: bool
    path: str | None
    dtype: str
    quantise: str | None
    fingerprint: str
    context_length: int | None
    state: Literal["loaded", "loading", "unloaded"]
    added_at: int


class NewBackbone(Body):
    """Body of POST /v1/backbones; `path` is a folder that every node of the service can see, or the name of a model
    that the service can fetch."""

    name: str = Field(min_length=1, max_length=64)
    path: str = Field(min_length=1, max_length=4096)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    quantise: str | None = Field(default=None, pattern=PATTERN)


class LoadAdapter(Body):
    """vLLM's body of POST /v1/load_lora_adapter; `lora_path` is a folder that the service can see."""

    lora_name: str
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(default=False, description="let a name that there is mean this one from now on")


class UnloadAdapter(Body):
    """vLLM's body of POST /v1/unload_lora_adapter; its number means nothing here."""

    lora_name: str
    lora_int_id: int | None = None


class JobErrorObject(Body):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(Body):
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
    scores_before: dict[str, float]
    scores_after: dict[str, float]
    test_file: str | None
    test_loss: float | None
    test_scores: dict[str, float]
    reason: str | None
    owner: str | None
    lease_until: int | None
    priority: int
    devices: int
    rung: dict[str, JsonValue] | None = None


class DryRunFile(Body):
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


class DryRun(Body):
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
    test_file: DryRunFile | None


class Renewal(Body):
    """Body of POST /v1/fine_tuning/jobs/{id}/renew."""

    lease_s: float = Field(ge=1, le=86400, allow_inf_nan=False)


class FineTuningJobEvent(Body):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue]


class SearchObject(Body):
    """`trials` counts those asked for by state, `front` has the numbers of its members, `finals` what those came to
    that were trained again, with half the width of their confidence intervals, `parameters` the axes of the space,
    `job` what every trial trains, on a backbone of this `shape`; `note` says why the search ended before all trials
    were run, or failed, or what it waits for."""

    id: str
    object: Literal["search"] = "search"
    name: str
    created_at: int
    finished_at: int | None
    status: Literal["running", "cancelling", "succeeded", "failed", "cancelled"]
    note: str | None
    objectives: tuple[str, ...]
    trials_total: int
    trials: dict[str, int]
    front: tuple[int, ...]
    finals: tuple[dict[str, JsonValue], ...]
    chosen: int | None
    parameters: tuple[dict[str, JsonValue], ...]
    job: dict[str, JsonValue]
    shape: dict[str, JsonValue]


class TrialObject(Body):
    """`candidate` is the graft and learning rate that `config`, a point of the space, means; `unseen` are the trials
    before it that had not been told when the sampler proposed it; it takes its steps up to the share `until`, on from
    the trial `parent`; `outcome` has values, or why there are none."""

    id: str
    object: Literal["search.trial"] = "search.trial"
    number: int
    state: Literal["running", "complete", "stopped", "failed"]
    loss: float | None
    config: dict[str, float]
    candidate: dict[str, JsonValue]
    told: int
    unseen: tuple[int, ...]
    attempt: int
    parent: int | None
    until: float
    outcome: dict[str, JsonValue] | None


class SearchEvent(Body):
    id: str
    object: Literal["search.event"] = "search.event"
    created_at: int
    message: str
    trial: int | None


class Page(Body, Generic[T]):
    """A list answer; `last_id` is the `after` of the next page."""

    object: Literal["list"] = "list"
    data: tuple[T, ...]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

"""What the HTTP API answers, as its client sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, JsonValue

FINAL = ("succeeded", "failed", "cancelled")


class Answer(BaseModel):
    """Read leniently, so that a newer server may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class JobFault(Answer):
    code: str
    message: str
    param: str | None = None


class RemoteFile(Answer):
    id: str
    filename: str
    bytes: int
    created_at: int


class RemoteJob(Answer):
    """A fine-tuning job as its tenant sees it; times in whole seconds since 1970, losses and scores on held-out
    examples (`cluster/scores.py`)."""

    id: str
    status: str
    model: str
    fine_tuned_model: str | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    method: dict[str, JsonValue] = {}
    error: JobFault | None = None
    graft: str | None = None
    pack: str | None = None
    parameters: int | None = None
    step: int = 0
    steps_total: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    scores_before: dict[str, float] = {}
    scores_after: dict[str, float] = {}
    test_loss: float | None = None
    test_scores: dict[str, float] = {}

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def score(self) -> float | None:
        """The score that says most of the held-out examples."""
        return self.scores_after.get("accuracy", self.scores_after.get("exact_match"))

    @property
    def kind(self) -> str:
        """Supervised, or classification."""
        return str(self.method.get("type", "supervised"))

    @property
    def peft(self) -> str:
        """The graft asked for: the union's text, or a PEFT config as JSON."""
        inner = self.method.get(self.kind)
        parameters = inner.get("hyperparameters") if isinstance(inner, dict) else None
        value = parameters.get("peft") if isinstance(parameters, dict) else None
        return value if isinstance(value, str) else json.dumps(value)


class JobEvent(Answer):
    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, JsonValue] | None = None


class CountedFile(Answer):
    """A file of a job that was not made: counts over the examples that were read, all of them if `complete`."""

    id: str
    examples: int
    complete: bool
    tokens: int
    trained_tokens: int
    longest: int
    cut: int
    warning: str | None = None


class RemoteDryRun(Answer):
    """What a job would be; `max_length` None cuts nothing."""

    model: str
    peft: str
    parameters: int
    learning_rate: float | None = None
    max_length: int | None = None
    steps: int | None = None
    training_file: CountedFile
    validation_file: CountedFile | None = None
    test_file: CountedFile | None = None

    @property
    def files(self) -> Mapping[str, CountedFile]:
        every = {name: getattr(self, name) for name in ("training_file", "validation_file", "test_file")}
        return {name: file for name, file in every.items() if file is not None}


class RemoteModel(Answer):
    """A model that may be asked: the backbone itself (`parent` None), or a graft on it."""

    id: str
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = None


class RemoteGraft(Answer):
    """A version of a graft. `current`: its name alone means it; `backbone` is None for a graft of another backbone than
    those that the service has."""

    id: str
    name: str
    version: int
    current: bool
    graft: str
    method: str
    backbone: str | None
    backbone_fingerprint: str
    parameters: int
    bytes: int
    created_at: int


class RemoteBackbone(Answer):
    """A frozen model that jobs and requests may name; `default` is the service's own. `path` is told to its operator
    alone; `state` is loaded, loading or unloaded."""

    id: str
    default: bool
    path: str | None = None
    dtype: str
    quantise: str | None = None
    fingerprint: str
    context_length: int | None = None
    state: str
    added_at: int

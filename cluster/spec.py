"""What a client may ask for: OpenAI's body of a new fine-tuning job, our fields among them, and its `JobSpec`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from polygraft.cluster.model import FileId, JobKind, JobSpec, Optimizer, Schedule
from polygraft.cluster.rung import Rung
from polygraft.cluster.validation import explain
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods import configs
from polygraft.grafts.spec import GraftSpec, SpecError

_PEFT_CHARACTERS = 100_000  # a config that names every projection of a large model; each job's record holds it
NAME = r"^[a-z0-9-]{1,40}$"
Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=1024)]
Multiplier = Annotated[float, Field(gt=0, le=1000)]

_DEFAULTS = JobSpec(backbone="", training_file=FileId(""))


@dataclass(frozen=True, slots=True)
class AskedGraft:
    """The field `peft`: a union such as "lora(r=8) + prefix(10)" or a PEFT config, as it was `given`, and what a union
    means; what a config means depends on the backbone (`grafts/formats/peft_config.py`)."""

    given: str | dict[str, object]
    spec: GraftSpec | None

    @property
    def text(self) -> str:
        """What a job's record keeps."""
        return _text(self.given)

    @staticmethod
    def read(given: str | dict[str, object]) -> AskedGraft:
        text = _text(given)
        if len(text) > _PEFT_CHARACTERS:
            raise ValueError(f"has {len(text)} characters; at most {_PEFT_CHARACTERS}")
        try:
            if not configs.is_config(text):
                return AskedGraft(given, parse(text))
            configs.check(configs.of_text(text))
            return AskedGraft(given, None)
        except SpecError as error:
            raise ValueError(str(error).removeprefix("peft: ")) from None


_Given = Annotated[str | dict[str, object], AfterValidator(AskedGraft.read), PlainSerializer(lambda asked: asked.given)]
Peft = Annotated[AskedGraft, GetPydanticSchema(lambda _, handler: handler.generate_schema(_Given))]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class LegacyHyperparameters(_Body):
    """OpenAI's deprecated top-level `hyperparameters`."""

    n_epochs: Auto | Epochs = "auto"
    batch_size: Auto | BatchSize = "auto"
    learning_rate_multiplier: Auto | Multiplier = "auto"


class Hyperparameters(LegacyHyperparameters):
    """OpenAI's three fields and ours."""

    peft: Peft = Field(default_factory=lambda: AskedGraft.read("lora"))
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "linear"
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int | None = Field(default=None, ge=2, le=1 << 20)
    dropout: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_learning_rate(self) -> Self:
        rate, multiplier = self.learning_rate, self.learning_rate_multiplier
        if rate is not None and multiplier not in ("auto", 1):  # a job is answered with its rate and a multiplier of 1
            raise ValueError(
                f"learning_rate ({rate:g}) and learning_rate_multiplier ({multiplier:g}) are both given; give one: the "
                "multiplier is of the method's own rate, so that beside a rate only 1 can stand"
            )
        return self


class Supervised(_Body):
    hyperparameters: Hyperparameters | None = None


class Method(_Body):
    """OpenAI's, and ours of a type that trains a classifier on labelled texts."""

    type: JobKind
    supervised: Supervised | None = None
    classification: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind in ("dpo", "reinforcement"):
            raise ValueError(f"type {kind!r} is not supported; use 'supervised' or 'classification'")
        return value

    @model_validator(mode="after")
    def _of_its_type(self) -> Self:
        other: JobKind = "classification" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: given with type {self.type!r}; move what it says to {self.type}")
        return self

    @property
    def own(self) -> Supervised | None:
        """What is said of the type."""
        return self.supervised if self.type == "supervised" else self.classification


class Owner(_Body):
    """Whoever wants the job and must keep saying so: it is cancelled `lease_s` seconds after the last word."""

    name: str = Field(min_length=1, max_length=200)
    lease_s: float = Field(ge=1, le=86400)


class RungRequest(_Body):
    """A part of a job's steps (`cluster/rung.py:Rung`): up to the share `until` of them, and on from where the job
    `after` ended at its own."""

    until: float = Field(default=1.0, ge=0, le=1)
    after: str | None = Field(default=None, min_length=1, max_length=100)


class FineTuningRequest(_Body):
    """Body of POST /v1/fine_tuning/jobs. `owner` and what follows it are ours, the rest is OpenAI's."""

    model: str = Field(min_length=1, max_length=200)
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(default=None, min_length=1, max_length=100)
    suffix: str | None = Field(default=None, pattern=NAME)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    method: Method | None = None
    hyperparameters: LegacyHyperparameters | None = None
    metadata: dict[str, str] | None = None
    integrations: None = None
    owner: Owner | None = None
    promote: bool = False
    test_file: str | None = Field(
        default=None, min_length=1, max_length=100, description="judged once, after training; nothing is chosen by it"
    )
    priority: int = Field(default=0, ge=-10, le=10, description="of two of your jobs that wait, the higher goes first")
    devices: int = Field(
        default=1, ge=1, le=64, description="the job's micro-batches are computed on so many at a time"
    )
    rung: RungRequest | None = None

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value and len(value) > 16:
            raise ValueError(f"{len(value)} pairs; at most 16")
        for key, text in (value or {}).items():
            if len(key) > 64 or len(text) > 512:
                raise ValueError(f"{key[:64]!r}: keys have at most 64 characters, values 512")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters: given with method, too; move them to method.supervised.hyperparameters")
        if self.suffix == self.model:
            raise ValueError(f"suffix: {self.suffix!r} is the name of the base model; choose another")
        return self

    @property
    def graft(self) -> GraftSpec | None:
        """The graft asked for by a union, None for a config."""
        return self._given.peft.spec

    @cached_property
    def _given(self) -> Hyperparameters:
        own = self.method.own if self.method else None
        return (own.hyperparameters if own else None) or Hyperparameters()

    @property
    def kind(self) -> JobKind:
        return self.method.type if self.method else _DEFAULTS.kind

    def to_spec(self) -> JobSpec:
        """The job asked for, defaults filled in; files are not looked up here."""
        given = self._given
        basic = self.hyperparameters or given
        multiplier = basic.learning_rate_multiplier
        return JobSpec(
            backbone=self.model,
            training_file=FileId(self.training_file),
            kind=self.kind,
            validation_file=FileId(self.validation_file) if self.validation_file else None,
            test_file=FileId(self.test_file) if self.test_file else None,
            suffix=self.suffix,
            peft=given.peft.text,
            epochs=_DEFAULTS.epochs if basic.n_epochs == "auto" else basic.n_epochs,
            batch_size=_DEFAULTS.batch_size if basic.batch_size == "auto" else basic.batch_size,
            learning_rate=given.learning_rate,
            learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
            optimizer=given.optimizer,
            schedule=given.schedule,
            warmup_ratio=given.warmup_ratio,
            weight_decay=given.weight_decay,
            max_grad_norm=given.max_grad_norm,
            max_length=given.max_length,
            dropout=given.dropout,
            seed=self.seed or 0,
            metadata=tuple((self.metadata or {}).items()),
            promote=self.promote,
            priority=self.priority,
            devices=self.devices,
            rung=None if self.rung is None else Rung(until=self.rung.until, after=self.rung.after),
        )


class BadRequest(ValueError):
    """A body that cannot be a request; `param` is the path of the field to blame, None for the body as a whole."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


def read_request(body: object) -> FineTuningRequest:
    """The request in a decoded JSON body. Raises BadRequest that names the field, the value and the choices."""
    try:
        return FineTuningRequest.model_validate(body)
    except ValidationError as error:
        path, message = explain(error, FineTuningRequest)
        raise BadRequest(path or None, message) from None


def _text(given: str | dict[str, object]) -> str:
    return given if isinstance(given, str) else json.dumps(given, sort_keys=True)

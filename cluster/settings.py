"""How a service is set up: flags win over the environment (`POLYGRAFT_*`), the environment over the YAML file."""

from __future__ import annotations

import os
import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from polygraft.cluster.model import Dtype, Limits
from polygraft.cluster.validation import explain, shown
from polygraft.grafts.methods.compressed.quantisation import PATTERN
from polygraft.grafts.text.plain_yaml import YamlError, read_yaml

HOME = "~/.polygraft"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.*")


def _folder(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))} is no path")
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{shown(str(path))} begins with nobody's home") from None


Folder = Annotated[Path, AfterValidator(_folder)]


class PackSettings(BaseModel):
    """One packed forward has at most `max_rows` rows; a job's micro-batch, fixed at admission, at most `micro_rows`.
    These, `max_jobs` and `memory_bytes` follow from the device and the model where they are not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_rows: PositiveInt = 768
    micro_rows: PositiveInt = 128
    max_jobs: PositiveInt = 32
    memory_bytes: NonNegativeInt | None = Field(
        default=None,
        description="for jobs and activations; 0 = no limit",
    )
    row_bytes: NonNegativeInt = Field(default=0, description="activation bytes of a row in forward and backward")
    bytes: PositiveInt | None = Field(default=None, description="of a device that a pack takes; not given: half of it")
    idle_s: PositiveFloat = Field(default=60.0, description="a pack without jobs is closed after this long")
    max_attempts: PositiveInt = Field(default=3, description="a job fails once suspected of so many packs' ends")
    opening_s: PositiveFloat = Field(default=20.0, description="who would wait longer for a place gets another pack")
    overtake_s: PositiveFloat = Field(default=60.0, description="how long a job that does not fit may be overtaken")
    patience_s: PositiveFloat = Field(
        default=600.0, description="a tenant none of whose jobs came into a pack for this long goes before the others"
    )
    silent_s: PositiveFloat = Field(
        default=30.0, description="a worker that does not answer for so long, which it does while it computes, is dead"
    )

    @model_validator(mode="after")
    def _a_micro_batch_fits_a_forward(self) -> Self:
        if self.micro_rows > self.max_rows:
            raise ValueError(f"micro_rows {self.micro_rows} is more than max_rows {self.max_rows}; lower it")
        return self


class ServeSettings(BaseModel):
    """What one engine replica takes on at a time. `max_streams`, `max_context`, `kv_bytes`, `graft_bytes` and
    `max_rows` follow from the device and the model where they are not given (`cluster/sizing.py`); the values here are
    those of an engine that is made without a service."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_streams: PositiveInt = 32
    max_context: PositiveInt = Field(default=512, description="tokens of prompt and answer, a graft's prefix included")
    kv_bytes: PositiveInt = Field(default=256 << 20, description="the key-value cache")
    graft_bytes: PositiveInt = Field(
        default=1 << 30, description="grafts in memory; their stacks may take as much again"
    )
    max_rows: PositiveInt = Field(default=256, description="rows of one step: one a decoding stream, the rest prefill")
    prefix_cache: bool = Field(
        default=True, description="what a tenant's prompts for one graft have in common is computed once"
    )
    bytes: PositiveInt | None = Field(
        default=None, description="of a device that a replica takes; not given: half of it"
    )
    max_queued: NonNegativeInt = Field(
        default=256, description="requests of one tenant that may wait; more are answered 429"
    )
    max_queued_in_all: NonNegativeInt = Field(
        default=4096, description="requests that may wait; nobody has more of them than there is room left"
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="what a tenant is served beside one of weight 1, where both have requests waiting"
    )
    patience_s: PositiveFloat = Field(
        default=10.0, description="a tenant's first request that has waited this long goes before everybody's"
    )
    min_replicas: PositiveInt = Field(default=1, description="of a backbone that is asked for")
    max_replicas: PositiveInt | None = Field(
        default=None,
        description="of a backbone; Ray is asked for the nodes. Not given: as many as there is room for on devices",
    )
    calm_s: PositiveFloat = Field(default=30.0, description="replicas go when fewer have been enough for so long")
    idle_s: PositiveFloat | None = Field(
        default=None, description="the last replica goes when nobody has asked for so long; not given: it stays"
    )
    drain_s: PositiveFloat = Field(default=30.0, description="how long a replica that goes may hand its streams on")
    wait_s: NonNegativeFloat = Field(
        default=60.0, description="how long a request waits for a replica where there is none; then it is answered 503"
    )
    silent_s: PositiveFloat = Field(
        default=10.0, description="a replica that says nothing for so long is dead to its ingresses, and they to it"
    )

    @model_validator(mode="after")
    def _the_least_is_not_more_than_the_most(self) -> Self:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}; lower it"
            )
        return self


class LimitSettings(BaseModel):
    """What a request may bring."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    upload_bytes: PositiveInt = 512 << 20
    line_bytes: PositiveInt = Field(default=1 << 20, description="one example of a JSONL file")
    graft_bytes: PositiveInt = Field(default=512 << 20, description="a graft made elsewhere, packed and unpacked")
    graft_s: PositiveFloat = Field(default=60.0, description="how long reading such a graft may take")
    jobs_per_tenant: PositiveInt = Field(default=1000, description="unfinished jobs of one tenant")
    jobs_in_packs_per_tenant: NonNegativeInt = Field(
        default=0, description="of those, how many may train at a time; 0 = no limit"
    )
    searches: PositiveInt | None = Field(
        default=None,
        description="searches that run at once, of all tenants; the others wait. Not given: as many as fit the machine",
    )
    bodies_per_tenant: PositiveInt = Field(default=32, description="requests of one tenant whose bodies have not ended")
    body_s: PositiveFloat = Field(default=30.0, description="a body may take so long, and a second more each 10 kB")


class Settings(BaseSettings):
    """Everything a service is told. The environment writes pack.max_jobs as POLYGRAFT_PACK__MAX_JOBS."""

    model_config = SettingsConfigDict(
        env_prefix="POLYGRAFT_", env_nested_delimiter="__", extra="forbid", frozen=True, allow_inf_nan=False
    )

    home: Folder = Path(HOME)
    data: Folder = Path()
    backbone: str = Field(default="smollm2", min_length=1)
    store_url: str = Field(default="embedded", pattern=r"^(embedded$|memory://|rediss?://|unix://)")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0 = any free port")
    api_key_file: Folder | None = Field(default=None, description="holds the first API key, as a mounted Secret does")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto = a GPU where there is one")
    dtype: Dtype = "auto"
    devices: PositiveInt | None = Field(default=None, description="devices that a machine without a GPU is split into")
    step_floor_s: NonNegativeFloat = Field(
        default=0.0, description="each step of a pack or an engine takes at least this long: for tests of capacity"
    )
    unload_s: NonNegativeFloat = Field(
        default=1800.0, description="a backbone that nobody has asked for so long is unloaded until it is; 0 = never"
    )
    quantise: str | None = Field(default=None, pattern=PATTERN, description="nf4, or loftq-RANK-ITERATIONS")
    pack: PackSettings = PackSettings()
    serve: ServeSettings = ServeSettings()
    limits: LimitSettings = LimitSettings()
    metrics_tenants: tuple[str, ...] = Field(
        default=("local",), description="whose keys may read /metrics, which is of all tenants together"
    )
    graft_roots: tuple[Folder, ...] = Field(default=(), description="where tenants may import grafts from, by path")

    @property
    def service_path(self) -> Path:
        """State of a running service: url, ray_address, ray_namespace, store_url, pid."""
        return self.home / "run" / "service.json"

    @property
    def api_key_path(self) -> Path:
        """API key of the local tenant, mode 0600."""
        return self.home / "api_key"

    @property
    def store_folder(self) -> Path:
        """Where the embedded store keeps its append-only file."""
        return self.home / "store"

    @property
    def pack_limits(self) -> Limits:
        """What policy needs to know. What is not given here follows from the backbones' sizes."""
        pack = self.pack
        names = {"max_jobs": "max_jobs", "memory_bytes": "pack_bytes", "max_rows": "max_rows"}
        return Limits(
            given=tuple(limit for name, limit in names.items() if name in pack.model_fields_set),
            max_jobs=pack.max_jobs,
            pack_bytes=pack.memory_bytes or 0,
            max_rows=pack.max_rows,
            row_bytes=pack.row_bytes,
            idle_s=pack.idle_s,
            max_attempts=pack.max_attempts,
            opening_s=pack.opening_s,
            overtake_s=pack.overtake_s,
            patience_s=pack.patience_s,
            tenant_jobs=self.limits.jobs_in_packs_per_tenant,
            unload_s=self.unload_s,
        )

    @property
    def told(self) -> str:
        """What was given, as JSON, from which `model_validate_json` makes these settings again."""
        return self.model_dump_json(exclude_unset=True, indent=2)

    def model_post_init(self, _context: object) -> None:
        if "data" not in self.model_fields_set:
            object.__setattr__(self, "data", self.home / "data")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        try:
            home = _folder(Path(init_settings.init_kwargs.get("home") or os.environ.get("POLYGRAFT_HOME") or HOME))
        except ValueError as error:
            raise SettingsError(f"home: {error}") from None
        return init_settings, _Environment(settings_cls), _ConfigFile(settings_cls, yaml_file=home / "config.yaml")


class _Environment(EnvSettingsSource):
    """The environment, without what Kubernetes puts there for the Services of a namespace: one that is called polygraft
    gives every pod a POLYGRAFT_PORT like tcp://10.0.0.1:8000."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        linked = isinstance(value, str) and _SERVICE_LINK.fullmatch(value) is not None
        return (None if linked and field_name == "port" else value), key, is_complex

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: object, value_is_complex: bool) -> object:
        try:
            return super().prepare_field_value(field_name, field, value, value_is_complex)
        except ValueError:
            raise SettingsError(f"{field_name}: the environment's {shown(value)} is no JSON; write it as one") from None


class BadSettings(ValueError):
    """Settings that cannot be used; the message names the field, the value and the choices."""


def load(**flags: object) -> Settings:
    """Settings from flags (None: not given), environment and file. Raises BadSettings."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise BadSettings(explain(error, Settings)[1]) from None
    except SettingsError as error:  # what a source says is the cause of what pydantic makes of it
        raise BadSettings(str(error.__cause__ or error)) from None


class _ConfigFile(YamlConfigSettingsSource):
    """The YAML file; one that cannot be read or holds no mapping is an error that names it."""

    def _read_file(self, file_path: Path | Traversable) -> dict[str, object]:
        try:
            content = read_yaml(file_path)
        except YamlError as error:
            raise SettingsError(f"{file_path}: {error}") from None
        if content is not None and not isinstance(content, dict):
            raise SettingsError(f"{file_path}: expected field: value lines, found {content!r}")
        return content or {}

"""The values of the control plane: jobs, packs, grafts, files, keys, and the snapshot that policy reads.

All are frozen. Times are seconds since the epoch, always given by the writer. What can be computed from other fields
is a property or a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NewType

from polygraft.cluster.rung import Rung
from polygraft.cluster.scores import UNJUDGED, Judged
from polygraft.cluster.size import Size
from polygraft.cluster.states import JobState, PackState, Reason, SearchState, is_final

JobId = NewType("JobId", str)  # ftjob-<hex>
PackId = NewType("PackId", str)  # pack-<hex>
ReplicaId = NewType("ReplicaId", str)
DeviceId = NewType("DeviceId", str)  # "<node>/<kind><index>"
TenantId = NewType("TenantId", str)
GraftId = NewType("GraftId", str)  # digest of tensors, slots and backbone fingerprint
FileId = NewType("FileId", str)  # file-<hex>
StudyId = NewType("StudyId", str)
ApiKeyId = NewType("ApiKeyId", str)  # key-<hex>
EventId = NewType("EventId", str)  # "<milliseconds>-<sequence>", the id of a stream entry

START = EventId("0-0")  # before every event

Optimizer = Literal["adamw"]
Schedule = Literal["linear", "constant", "cosine"]
JobKind = Literal["supervised", "classification"]
DeviceKind = Literal["cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """Who may call the API; only the SHA-256 of the key's text is kept."""

    id: ApiKeyId
    tenant: TenantId
    name: str
    digest: str
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """An uploaded file, checked; its content lies at `<data>/files/<id>.jsonl`."""

    id: FileId
    tenant: TenantId
    filename: str
    bytes: int
    purpose: str
    created_at: float
    digest: str
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What was asked for, defaults filled in.

    `peft` is the union grammar's text or a PEFT config as JSON. `learning_rate` None means the method's own default,
    times `learning_rate_multiplier`. `dropout` None means what the slots say. `warmup_ratio` is a share of all steps.
    `max_length` None cuts no example that the backbone's positions and the pack's memory have room for. On `test_file`
    the graft is judged once, after training. `priority` orders a tenant's own jobs; the job trains over `devices`, all
    its steps or up to a `rung`. Of `kind` classification it trains a classifier, too, on labelled texts."""

    backbone: str
    training_file: FileId
    kind: JobKind = "supervised"
    validation_file: FileId | None = None
    test_file: FileId | None = None
    suffix: str | None = None
    peft: str = "lora"
    epochs: int = 3
    batch_size: int = 4
    learning_rate: float | None = None
    learning_rate_multiplier: float = 1.0
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    dropout: float | None = None
    seed: int = 0
    metadata: tuple[tuple[str, str], ...] = ()
    promote: bool = False
    priority: int = 0
    devices: int = 1
    rung: Rung | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in OpenAI's shape; `param` names the field of the request, if one is to blame."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One fine-tune.

    A queued job with a `pack` is admitted there and its worker has not started it yet. `reason` says why it waits,
    why it went back to the queue, or why it is being stopped. `attempts` counts packs that failed with it as a suspect.
    `admitted_at` is when it came into its pack, or the last one; `blocked_at` since when it is its turn and no pack has
    room for it. A running job that is `moving_to` another pack leaves its own at its next step boundary; a waiting one
    has left it. `parameters` (trainable ones) and the `frozen` elements of the graft's tensors are known from the
    submission on where the ingress knows the backbone's shape. `device_class` is that of the device which computes its
    steps, within which they are the same to the last bit. `model` is "name@n" once published. Progress (`step`, tokens,
    losses, what is `judged`) is written by the worker without an event; all else changes only through `evolve`."""

    id: JobId
    tenant: TenantId
    spec: JobSpec
    created_at: float
    state: JobState = JobState.QUEUED
    parameters: int | None = None
    frozen: int = 0
    owner: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    stopping: bool = False
    pack: PackId | None = None
    moving_to: PackId | None = None
    reason: Reason | None = None
    attempts: int = 0
    admitted_at: float | None = None
    blocked_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    steps_total: int | None = None
    step: int = 0
    trained_tokens: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    judged: Judged = UNJUDGED
    device_class: str | None = None
    model: str | None = None
    graft: GraftId | None = None
    error: JobError | None = None

    @property
    def name(self) -> str:
        """The name its graft is published under."""
        return self.spec.suffix or self.id

    @property
    def final(self) -> bool:
        return is_final(self.state)

    @property
    def waiting(self) -> bool:
        """In the queue and in no pack."""
        return self.state is JobState.QUEUED and self.pack is None

    @property
    def active(self) -> bool:
        """In a pack: admitted or running."""
        return not self.final and self.pack is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Graft:
    """A published version of a graft, in `<data>/grafts/<id>/`. It takes `context_length` positions before a prompt."""

    tenant: TenantId
    name: str
    version: int
    id: GraftId
    method: str
    backbone_fingerprint: str
    parameters: int
    bytes: int
    context_length: int
    created_at: float
    job: JobId | None = None

    @property
    def model(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """What the bare name means now (`version`; 0 = nothing), and the highest given out (`latest`); none is reused."""

    tenant: TenantId
    name: str
    version: int
    latest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A frozen model that jobs name to be trained on, and requests to be answered by.

    Its files lie in `folder` on every node; `dtype` and `quantise` say how packs and replicas load them, and
    `fingerprint` which model that is. `context_length` is how many positions it has, None: no limit. `asked_at` is
    about when it was last asked for an answer, 0: not since it was unloaded. `loaded`: replicas are to hold it.
    `sizes` are those of its packs and replicas.
    """

    name: str
    folder: str
    dtype: Dtype
    quantise: str | None
    fingerprint: str
    context_length: int | None
    added_at: float
    asked_at: float
    loaded: bool = False
    sizes: tuple[Size, ...] = ()

    @property
    def id(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A backbone on a set of devices that trains jobs together; `epoch` is that of the controller which opened it, and
    `bytes` are what it holds of each of its devices until it is over."""

    id: PackId
    backbone: str
    devices: tuple[DeviceId, ...]
    bytes: int
    epoch: int
    opened_at: float
    state: PackState = PackState.OPENING
    closed_at: float | None = None
    error: str | None = None

    @property
    def final(self) -> bool:
        return is_final(self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What the pack `id` measured of its jobs at `at`: in how many seconds each is expected to end."""

    id: PackId
    at: float
    left_s: Mapping[JobId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A backbone that serves grafts on a set of devices, `bytes` of each. Ray finds its process by the name `actor`."""

    id: ReplicaId
    backbone: str
    devices: tuple[DeviceId, ...]
    bytes: int
    actor: str
    opened_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a backbone can live: an accelerator, or a share of a node's cores and memory.

    `index` counts the devices of a kind on their node, as the process that uses one is told it. `bytes` is the memory
    that may be given out. `speed` is how many floating-point operations a second a large product reaches there, 0 where
    nobody has measured it.
    """

    id: DeviceId
    node: str
    kind: DeviceKind
    index: int
    cores: int
    bytes: int
    speed: float


@dataclass(frozen=True, slots=True)
class Holding:
    """What a pack or a replica has of a device's memory, in bytes."""

    holder: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """A device that is there, and who holds how much of its memory. Whoever computes on it is among them, and together
    they never hold more than there is, unless it has shrunk."""

    device: Device
    holders: tuple[Holding, ...] = ()

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self.device.bytes - sum(holding.bytes for holding in self.holders)

    def held_by(self, holder: str) -> bool:
        return any(holding.holder == holder for holding in self.holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The truth about a search: `body` is JSON that only `tuning` reads."""

    id: StudyId
    tenant: TenantId
    name: str
    created_at: float
    updated_at: float
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search that the service runs: whose study has its id. `note` says why it ended before all trials, or failed, or
    why it waits; `starts` counts its drivers.
    """

    id: StudyId
    tenant: TenantId
    name: str
    created_at: float
    state: SearchState = SearchState.RUNNING
    cancel_requested: bool = False
    finished_at: float | None = None
    note: str | None = None
    starts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one pack may hold, and when packs, jobs and the replicas of a backbone are given up.

    `pack_bytes` covers the jobs' state and one forward of `max_rows` rows at `row_bytes` activation bytes a row; 0
    bytes = no limit. A pack takes about `opening_s` to open: a job that no open pack has room for gets a new one where
    it would wait longer for a place. A move costs a job about `moving_s`: a pack that ends sooner is not joined. A job
    that does not fit may be overtaken for `overtake_s` by others that do. A tenant with jobs in packs that got no other
    in for `patience_s` goes first, and so do jobs for which there is no pack. It has at most `tenant_jobs` of them; 0 =
    no limit. A backbone that nobody has asked for `unload_s` seconds is unloaded; 0 = never. What no setting has
    `given` is as the sizes of a pack's backbone say (`policy/budget.py:limits_of`)."""

    given: tuple[str, ...] = ()
    max_jobs: int = 32
    pack_bytes: int = 0
    max_rows: int = 768
    row_bytes: int = 0
    idle_s: float = 60.0
    max_attempts: int = 3
    opening_s: float = 20.0
    moving_s: float = 5.0
    overtake_s: float = 60.0
    patience_s: float = 600.0
    tenant_jobs: int = 0
    unload_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The fleet after the event `version`: unfinished jobs and packs, recently finished ones, backbones, replicas,
    devices.

    `over` are its finished jobs in the order of their ends. The caller of `decide` sets what is not in the log: `now`,
    `limits`, the `paces` that packs measured lately, and the nodes that are to go, which are `draining`.
    """

    version: EventId = START
    now: float = 0.0
    limits: Limits = field(default_factory=Limits)
    jobs: Mapping[JobId, Job] = field(default_factory=lambda: MappingProxyType({}))
    over: tuple[JobId, ...] = ()
    packs: Mapping[PackId, Pack] = field(default_factory=lambda: MappingProxyType({}))
    backbones: Mapping[str, Backbone] = field(default_factory=lambda: MappingProxyType({}))
    replicas: Mapping[ReplicaId, Replica] = field(default_factory=lambda: MappingProxyType({}))
    devices: Mapping[DeviceId, Device] = field(default_factory=lambda: MappingProxyType({}))
    paces: Mapping[PackId, Pace] = field(default_factory=lambda: MappingProxyType({}))
    draining: tuple[str, ...] = ()

    def free_bytes(self, device: DeviceId) -> int:
        """Memory of the device that no unfinished pack and no open replica holds."""
        packs = sum(pack.bytes for pack in self.packs.values() if not pack.final and device in pack.devices)
        replicas = sum(replica.bytes for replica in self.replicas.values() if device in replica.devices)
        return self.devices[device].bytes - packs - replicas


Record = (
    ApiKey | DataFile | Job | Graft | Alias | Backbone | Pack | Pace | Replica | Occupancy | Search | Study | Snapshot
)

"""What an engine tells an ingress: at most one StepMessage a step, with the tokens of its requests and the load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polygraft.cluster.model import GraftId

FinishReason = Literal["stop", "length", "cancelled", "error"]
ErrorCode = Literal["context_length_exceeded", "unknown_token", "out_of_memory", "wrong_model"]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step gave one request: token number `index` (None: it ended without one), and why it ended if it did.

    `probabilities` are the labels', in their order, at the end of a request that classifies its prompt.
    `code` says of an `error` what whoever asked can mend, or that there was no room; without one the log has more
    under the request's id.
    (request, index) is unique over all attempts; `attempt` is the one that computed it, for which `found` of the tokens
    that it came with had been computed before.
    """

    request: str
    index: int
    token: int | None
    finish_reason: FinishReason | None = None
    attempt: int = 0
    error: str | None = None
    code: ErrorCode | None = None
    probabilities: tuple[float, ...] | None = None
    found: int = 0


@dataclass(frozen=True, slots=True)
class QueueFull:
    """A replica takes no request of this tenant now; `retry_after_s` by how fast its queue moved."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Tally:
    """What an engine has done since it began. Requests that `entered` the batch waited `queued_s` seconds together,
    `preemptions` had to leave it again, and `loads` grafts were read in `load_s` seconds. Of `prefix_queries` tokens of
    requests that entered and might have been computed before, `prefix_hits` were."""

    steps: int = 0
    rows: int = 0
    step_s: float = 0.0
    entered: int = 0
    queued_s: float = 0.0
    preemptions: int = 0
    loads: int = 0
    load_s: float = 0.0
    evictions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(frozen=True, slots=True)
class Draining:
    """A replica takes no request any more: it hands on what it has, and ends."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is, and which grafts it holds in memory. `deferred` of those that wait do so for their
    graft."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    free_blocks: int = 0
    resident: tuple[GraftId, ...] = ()
    resident_bytes: int = 0
    deferred: int = 0
    tally: Tally = Tally()


@dataclass(frozen=True, slots=True)
class StepMessage:
    """Tokens in the order they were computed; none in a stream's first message, which says that it is open.
    `draining`: the replica goes on with what it has only until that is taken from it."""

    tokens: tuple[StepTokens, ...]
    load: Load
    draining: bool = False

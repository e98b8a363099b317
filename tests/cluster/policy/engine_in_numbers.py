"""An engine in numbers only: what it does with the plans of the policy, and what it serves to each tenant."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from polygraft.cluster.model import TenantId
from polygraft.cluster.policy.batching import Running, StepPlan, Waiting, admit_streams
from polygraft.cluster.policy.entry import blocks_for
from polygraft.cluster.policy.fairness import ANSWER_TOKEN, PROMPT_TOKEN, Ledger, entering

BLOCK = 4


@dataclass
class Stream:
    tenant: TenantId
    number: int
    prompt: int
    wanted: int
    known: int = 0  # of the prompt, when it enters first
    computed: int = 0
    said: int = 0
    entered: int | None = None
    held: int = 0
    since: int = 0

    @property
    def id(self) -> str:
        return f"{self.tenant}{self.number}"

    @property
    def tokens(self) -> int:
        return self.prompt + self.said

    @property
    def cost(self) -> float:
        return entering(self.prompt, self.known) if self.entered is None else 0.0

    def waiting(self, overdue: bool = False) -> Waiting:
        known = self.known if self.entered is None else 0
        return Waiting(self.id, self.tokens - known, self.tokens, 1, self.tenant, self.cost, overdue)

    def running(self) -> Running:
        missing = max(0, blocks_for(self.computed + 1, BLOCK) - self.held)
        return Running(self.id, self.tokens - self.computed, self.held, missing, 1, self.tenant)


class Engine:
    """What an engine does with a plan, in numbers only; streams are never compared with what the policy remembers."""

    def __init__(self, *, blocks: int, streams: int, rows: int, weights: Mapping[TenantId, float]) -> None:
        self.free, self._streams, self._rows = blocks, streams, rows
        self.ledger = Ledger(weights)
        self.queue: list[Stream] = []
        self.run: list[Stream] = []
        self.service: dict[TenantId, float] = defaultdict(float)
        self.answers: Counter[TenantId] = Counter()
        self._entered = 0

    def step(self) -> StepPlan:
        plan = admit_streams(
            [stream.waiting() for stream in self.queue],
            [stream.running() for stream in self.run],
            ledger=self.ledger,
            free_blocks=self.free,
            block_size=BLOCK,
            max_streams=self._streams,
            rows=self._rows,
        )
        found = {stream.id: stream for stream in (*self.queue, *self.run)}
        for id in plan.evicted:
            self._leave(found[id])
            found[id].computed = 0
            self.submit(found[id])
        for id in plan.admitted:
            self._enter(found[id])
        for id, rows in plan.chunks:
            stream = found[id]
            more = max(0, blocks_for(stream.computed + rows, BLOCK) - stream.held)
            self.free, stream.held, stream.computed = self.free - more, stream.held + more, stream.computed + rows
            if stream.computed == stream.tokens:
                stream.said += 1
                self.service[stream.tenant] += ANSWER_TOKEN
                self.ledger = self.ledger.charged({stream.tenant: ANSWER_TOKEN})
                if stream.said == stream.wanted:
                    self.answers[stream.tenant] += 1
                    self._leave(stream)
        assert self.free >= 0 and len(self.run) <= self._streams
        return plan

    def submit(self, stream: Stream) -> None:
        queued = {other.tenant for other in self.queue}
        if stream.tenant not in queued:
            self.ledger = self.ledger.joined(stream.tenant, queued)
        self.queue.append(stream)
        self.queue.sort(key=lambda one: (one.number, one.tenant))

    def _enter(self, stream: Stream) -> None:
        self.queue.remove(stream)
        if stream.tenant not in {other.tenant for other in self.queue}:
            self.ledger = self.ledger.left(stream.tenant)
        if stream.entered is None:
            self.service[stream.tenant] += (stream.prompt - stream.known) * PROMPT_TOKEN
            self.ledger = self.ledger.charged({stream.tenant: stream.cost})
            stream.computed = stream.known
            stream.entered, self._entered = self._entered, self._entered + 1
        self.run.append(stream)
        self.run.sort(key=lambda one: one.entered or 0)
        stream.held = blocks_for(stream.tokens, BLOCK)
        self.free -= stream.held

    def _leave(self, stream: Stream) -> None:
        self.run.remove(stream)
        self.free, stream.held = self.free + stream.held, 0

"""One generation from request to last token: what it has so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from polygraft.cluster.model import GraftId, TenantId
from polygraft.cluster.policy.fairness import entering
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input
from polygraft.serving.messages import FinishReason
from polygraft.serving.prefixes import NOTHING, Match
from polygraft.serving.request import GenerationRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request in the engine. Cache slots hold the graft's prefix, then `computed` of `tokens`, the first `virtual` of
    which are the graft's own; where it is `cacheable`, those of another one that begins alike are its own, too.
    `match` is what was found of it when that was last asked for. `entered` is its number among those that were ever
    admitted, which it keeps; one that is `overdue` goes before others."""

    request: GenerationRequest
    arrival: float
    entered: int | None = None
    overdue: bool = False
    prefix: int = 0
    virtual: int = 0
    reads_prompt: bool = False
    cacheable: bool = True
    match: Match = NOTHING
    computed: int = 0
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.generated]

    def attach_graft(self, graft: BoundGraft) -> None:
        """Take in what the graft puts before the prompt; again is as once."""
        self.prefix, self.reads_prompt = graft.prefix_length, graft.reads_prompt
        self.cacheable = graft.prefix_cacheable
        if not self.virtual:
            self.virtual = graft.virtual_length
            self.tokens = [*virtual_ids(self.virtual), *self.tokens]

    @property
    def tenant(self) -> TenantId:
        return self.request.tenant

    @property
    def cost(self) -> float:
        """Virtual tokens that its tenant pays when it enters (fairness.py), by what was found of it: nothing where it
        had to leave and comes back."""
        given = len(self.request.prompt_ids) + len(self.request.generated)
        return entering(given, self.found) if self.entered is None else 0.0

    @property
    def found(self) -> int:
        """How many of the tokens that it came with had been computed before."""
        return max(0, self.match.slots - self.prefix - self.virtual)

    @property
    def generated(self) -> int:
        """Tokens generated so far, over all attempts; also the index of the next one."""
        return len(self.tokens) - self.virtual - len(self.request.prompt_ids)

    @property
    def left(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def min_chunk(self) -> int:
        """How many of these its next step must compute at least: all of a prompt that virtual tokens are made of."""
        return self.virtual + len(self.request.prompt_ids) if self.reads_prompt and not self.computed else 1

    def prompt(self, rows: int) -> Input | None:
        """Which of its next `rows` tokens are the prompt's, counted from the first of them."""
        first, end = self.virtual, self.virtual + len(self.request.prompt_ids)
        low, high = max(first, self.computed), min(end, self.computed + rows)
        if low >= high:
            return None
        return Input(low - self.computed, high - self.computed, low - first, end - high)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - self.generated

    @property
    def cached(self) -> int:
        """Cache slots in use, the prefix among them; also the position of the next row."""
        return self.prefix + self.computed

    @property
    def owner(self) -> tuple[TenantId, GraftId | None]:
        """With whose keys and values it may share: no other tenant learns from the time it takes what this one asks."""
        return self.tenant, self.request.graft

    @property
    def ids(self) -> list[int]:
        """What stands for its cache slots, those to come too: with the graft they say all that is in them."""
        return [*virtual_ids(self.prefix), *self.tokens]

    def finish_reason(self, token: int) -> FinishReason | None:
        """Why the sequence ends with `token` as its next one; None while it goes on."""
        if token in self.request.eos_ids and not self.request.ignore_eos:
            return "stop"
        return "length" if self.remaining <= 1 else None

"""What is asked of an engine; without torch, which what watches a replica does not load."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.cluster.model import GraftId, TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt and how to continue it.

    `generated` are tokens an earlier attempt already gave the client: they are context, not prompt, and the next token
    has index len(generated), so that a stream taken over by another replica draws what the first would have drawn.
    `eos_ids` end it, unless it is to `ignore_eos`; none of them is among its first `min_tokens`. `attempt` counts from
    0; messages of an older attempt are stale. `prefix` are the virtual tokens of the graft, as far as the ingress
    knows; the engine asks the graft itself. A prompt that it `classifies` is not continued: its labels' probabilities
    are its end.
    """

    id: str
    tenant: TenantId
    graft: GraftId | None
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    generated: tuple[int, ...] = ()
    attempt: int = 0
    ingress: str = ""
    prefix: int = 0
    classifies: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids: empty; a generation needs at least one token")
        if self.max_tokens <= len(self.generated):
            raise ValueError(
                f"max_tokens: {self.max_tokens} leaves nothing to generate after {len(self.generated)} tokens"
            )

    @property
    def resumed(self) -> bool:
        """Whether another replica had it: it was accepted once, and is not refused, nor kept waiting, for its queue."""
        return self.attempt > 0

"""An engine on the tiny Llama, turned by hand, and what its one listener heard."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from polygraft.cluster.model import ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.engine import Engine
from polygraft.serving.messages import Load, StepTokens
from polygraft.serving.request import GenerationRequest


@dataclass
class Heard:
    """Tokens by request, and the end of each."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[str, StepTokens] = field(default_factory=dict)

    def __call__(self, step: tuple[StepTokens, ...], _: Load) -> None:
        for said in step:
            assert said.index == len(self.tokens[said.request]) and said.request not in self.ends
            if said.token is not None:
                self.tokens[said.request].append(said.token)
            if said.finish_reason is not None:
                self.ends[said.request] = said

    def reasons(self) -> dict[str, str | None]:
        return {request: said.finish_reason for request, said in self.ends.items()}


def engine_on(
    backbone: Backbone, data: Path, *, heard: Heard | None = None, graft_bytes: int = 1 << 30, **settings: int
) -> Engine:
    """Not started: call `turn`."""
    given = {"max_context": 128, "kv_bytes": 4 << 20, "max_rows": 24, **settings}
    engine = Engine(backbone, ServeSettings(**given), replica=ReplicaId("r0"), data=data, graft_bytes=graft_bytes)  # type: ignore[arg-type]
    engine.listen("", heard or Heard())
    return engine


def request(id: str, prompt: tuple[int, ...], max_tokens: int = 12, **fields: object) -> GenerationRequest:
    defaults: dict[str, object] = {"temperature": 0.0, "graft": None, "tenant": TenantId("t")}
    return GenerationRequest(id=id, prompt_ids=prompt, max_tokens=max_tokens, **{**defaults, **fields})  # type: ignore[arg-type]


def run(engine: Engine, turns: int = 400) -> None:
    """Turn until nothing is left to do; loading a graft takes another thread's time."""

    for _ in range(turns):
        busy = engine.turn()
        if not busy and not engine.load.waiting and not engine.load.running:
            return
        if not busy:
            time.sleep(0.01)
    raise AssertionError(f"still busy after {turns} turns: {engine.load}")

"""One request on its way through replicas: the attempts that count, and the tokens that came of them, each once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from polygraft.cluster.model import ReplicaId
from polygraft.serving.messages import StepTokens
from polygraft.serving.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class Lost:
    """No replica computes the stream any more. `planned`: its replica was told to go, and it is nobody's failure."""

    planned: bool


@dataclass(slots=True, eq=False)
class InFlight:
    """`request` is the newest attempt; `live` are the attempts whose tokens count, with who computes each: two while a
    stream is handed from one replica to the next, none while it is lost. What an attempt says is what every other one
    says at the same index, so that the first that says it is heard.

    `tokens` are those that were accepted, `arrived` what its reader has not taken yet, `over` whether the last one is
    among them. `deaths` counts replicas that died under it. `heard` is set when the newest attempt says something, or
    will not.
    """

    request: GenerationRequest
    live: dict[int, ReplicaId] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    arrived: asyncio.Queue[StepTokens | Lost] = field(default_factory=asyncio.Queue)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    deaths: int = 0
    over: bool = False

    def accept(self, replica: ReplicaId, said: StepTokens) -> None:
        """Take in what `replica` said: (request, index) once, and nothing of an attempt that is not its own."""
        if self.over or self.live.get(said.attempt) != replica:
            return
        if said.attempt == self.request.attempt:
            self.heard.set()
        if said.index < len(self.tokens):
            return
        if said.index > len(self.tokens):  # a message was lost, and with it the tokens before this one
            self.withdraw(said.attempt, planned=False)
            return
        if said.token is not None:
            self.tokens.append(said.token)
        self.over = said.finish_reason is not None
        self.arrived.put_nowait(said)

    def lose(self, replica: ReplicaId, *, planned: bool) -> None:
        """`replica` is gone, and every attempt that it computed."""
        for attempt in [attempt for attempt, at in self.live.items() if at == replica]:
            self.withdraw(attempt, planned=planned)

    def withdraw(self, attempt: int, *, planned: bool) -> None:
        """The attempt counts no longer; without another one its reader is told that the stream is lost."""
        if self.live.pop(attempt, None) is None:
            return
        if attempt == self.request.attempt:
            self.heard.set()
        if not self.live and not self.over:
            self.arrived.put_nowait(Lost(planned))

    def only_at(self, replica: ReplicaId) -> bool:
        """Whether `replica` computes it and nobody else does."""
        return not self.over and list(self.live.values()) == [replica]

    def next(self) -> GenerationRequest:
        """What the next attempt would be: it goes on behind the tokens there are."""
        return replace(self.request, attempt=self.request.attempt + 1, generated=tuple(self.tokens))

    def advance(self) -> None:
        self.request = self.next()
        self.heard.clear()

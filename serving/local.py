"""A replica in this process: an engine's messages as a stream on an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from polygraft.serving.engine import Engine
from polygraft.serving.mailbox import Mailbox
from polygraft.serving.messages import QueueFull, StepMessage
from polygraft.serving.sequence import GenerationRequest


class LocalLink:
    """The `Link` that every other one ends at: the Serve replica answers its ingresses with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def submit(self, request: GenerationRequest) -> QueueFull | None:
        if not self._engine.hears(request.ingress):  # nobody would get the tokens: the ingress must connect again
            raise ConnectionError(f"ingress {request.ingress!r} does not follow this replica's messages")
        return self._engine.submit(request)

    async def cancel(self, request: str) -> None:
        self._engine.cancel(request)

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        """At most one message a step; leaving the loop ends the requests of `ingress`."""
        mailbox = Mailbox(self._engine.load)
        listener = mailbox.put
        self._engine.listen(ingress, listener)
        try:
            while True:
                yield await mailbox.take()
        finally:
            self._engine.leave(ingress, listener)

"""A replica in this process: an engine's messages as a stream on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from polygraft.cluster.model import GraftId
from polygraft.serving.engine import Engine
from polygraft.serving.mailbox import Mailbox
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.request import GenerationRequest

_LOOK_S = 0.02  # how long the end of a drain may go unnoticed
_LEAVE_S = 1.0  # how long readers have for their last message


class LocalLink:
    """The `Link` that every other one ends at: the replica's process answers its ingresses with it. All on one event
    loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mailboxes: set[Mailbox] = set()
        self._draining = False
        self._over = False

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        if self._draining:
            return Draining()
        if not self._engine.hears(request.ingress):  # nobody would get the tokens: the ingress must connect again
            raise ConnectionError(f"ingress {request.ingress!r} does not follow this replica's messages")
        return self._engine.submit(request)

    async def cancel(self, request: str) -> None:
        self._engine.cancel(request)

    async def warm(self, graft: GraftId) -> None:
        self._engine.expect(graft)
        while self._engine.expects(graft):
            await asyncio.sleep(_LOOK_S)

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        """At most one message a step; leaving the loop ends the requests of `ingress`. It ends with a drain."""
        if self._over:
            raise ConnectionError("this replica has handed on what it had, and ends")
        mailbox = Mailbox(self._engine.load, draining=self._draining)
        listener = mailbox.put
        self._mailboxes.add(mailbox)
        self._engine.listen(ingress, listener)
        try:
            while (message := await mailbox.take()) is not None:
                yield message
        finally:
            self._mailboxes.discard(mailbox)
            self._engine.leave(ingress, listener)

    async def drain(self, patience_s: float) -> None:
        """Take nothing more, have every ingress take its streams elsewhere, and end all messages when none is left, or
        after `patience_s` seconds: what is left then is theirs to ask for elsewhere."""
        self._draining = True
        for mailbox in self._mailboxes:
            mailbox.drain()
        try:
            async with asyncio.timeout(patience_s):
                while not self._engine.idle():
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            pass
        self._over = True
        for mailbox in self._mailboxes:
            mailbox.close()
        try:
            async with asyncio.timeout(_LEAVE_S):
                while self._mailboxes:
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            pass

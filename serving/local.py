"""A replica in this process: an engine's messages as a stream on an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from math import inf

from polygraft.cluster.model import GraftId
from polygraft.serving.engine import Engine
from polygraft.serving.mailbox import Mailbox
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.request import GenerationRequest

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.02  # how long the end of a drain may go unnoticed
_LEAVE_S = 1.0  # how long readers have for their last message


class LocalLink:
    """The `Link` that every other one ends at: the replica's process answers its ingresses with it. All on one event
    loop."""

    def __init__(self, engine: Engine, *, silent_s: float = inf) -> None:
        """An ingress that is not heard of for `silent_s` seconds is gone."""
        self._engine, self._silent_s = engine, silent_s
        self._mailboxes: set[Mailbox] = set()
        self._attended: dict[str, float] = {}
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

    async def attend(self, ingress: str) -> None:
        self._attended[ingress] = asyncio.get_running_loop().time()

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        """At most one message a step; leaving the loop ends the requests of `ingress`, and so does its silence. It ends
        with a drain."""
        if self._over:
            raise ConnectionError("this replica has handed on what it had, and ends")
        mailbox = Mailbox(self._engine.load, draining=self._draining)
        listener = mailbox.put
        self._mailboxes.add(mailbox)
        self._engine.listen(ingress, listener)
        await self.attend(ingress)
        self._watch(ingress, mailbox)
        try:
            while (message := await mailbox.take()) is not None:
                yield message
        finally:
            self._mailboxes.discard(mailbox)
            if self._engine.leave(ingress, listener):
                self._attended.pop(ingress, None)

    def _watch(self, ingress: str, mailbox: Mailbox) -> None:
        """Look, now and again until the mailbox is closed, whether anybody reads it: Ray does not tell a replica that
        who asked it is gone."""
        if mailbox not in self._mailboxes or self._silent_s == inf:
            return
        loop = asyncio.get_running_loop()
        left_s = self._attended[ingress] + self._silent_s - loop.time()
        if left_s > 0:
            loop.call_later(left_s, self._watch, ingress, mailbox)
        else:
            _LOG.warning("ingress %s has been silent for %g s: its requests end", ingress, self._silent_s)
            mailbox.close()

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

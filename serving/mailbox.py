"""Messages on their way from the engine's thread to one reader on an event loop; waiting ones are joined."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from threading import Lock

from polygraft.serving.messages import Load, StepMessage, StepTokens


class Mailbox:
    """Made on the reader's event loop; `put` may be called from any thread and never blocks."""

    def __init__(self, load: Load, *, draining: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = Lock()
        self._tokens: list[StepTokens] = []
        self._load = load
        self._draining = draining
        self._closed = False
        self._filled.set()  # the first message says that the stream is open

    def put(self, tokens: tuple[StepTokens, ...], load: Load) -> None:
        """One that is closed takes nothing."""
        with self._lock:
            if self._closed:
                return
            self._tokens += tokens
            self._load = load
        with suppress(RuntimeError):  # the reader's loop is closed, and the reader gone with it
            self._loop.call_soon_threadsafe(self._filled.set)

    def drain(self) -> None:
        """Say so with the next message, at once. On the reader's event loop, as `close`."""
        self._draining = True
        self._filled.set()

    def close(self) -> None:
        """What was put until now is the last message."""
        with self._lock:
            self._closed = True
        self._filled.set()

    async def take(self) -> StepMessage | None:
        """Everything since the last call, in order, and the newest load; None when it is closed and empty."""
        await self._filled.wait()
        with self._lock:
            if self._closed and not self._tokens:
                return None
            if not self._closed:
                self._filled.clear()
            tokens, self._tokens = tuple(self._tokens), []
            return StepMessage(tokens, self._load, self._draining)

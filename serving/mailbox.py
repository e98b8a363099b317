"""Messages on their way from the engine's thread to one reader on an event loop; waiting ones are joined."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from threading import Lock

from polygraft.serving.messages import Load, StepMessage, StepTokens


class Mailbox:
    """Made on the reader's event loop; `put` may be called from any thread and never blocks."""

    def __init__(self, load: Load) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = Lock()
        self._tokens: list[StepTokens] = []
        self._load = load
        self._filled.set()  # the first message says that the stream is open

    def put(self, tokens: tuple[StepTokens, ...], load: Load) -> None:
        with self._lock:
            self._tokens += tokens
            self._load = load
        with suppress(RuntimeError):  # the reader's loop is closed, and the reader gone with it
            self._loop.call_soon_threadsafe(self._filled.set)

    async def take(self) -> StepMessage:
        """Everything since the last call, in order, and the newest load."""
        await self._filled.wait()
        with self._lock:
            self._filled.clear()
            tokens, self._tokens = tuple(self._tokens), []
            return StepMessage(tokens, self._load)

"""Messages on their way from the engine's thread to one reader on an event loop; waiting ones are joined."""

from __future__ import annotations

import asyncio
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
        self._closed = False
        self._filled.set()  # the first message says that the stream is open

    def put(self, tokens: tuple[StepTokens, ...], load: Load) -> None:
        with self._lock:
            self._tokens += tokens
            self._load = load
        self._wake()

    def close(self) -> None:
        """No more will come; the reader gets what is there and then stops."""
        self._closed = True
        self._wake()

    async def take(self) -> StepMessage | None:
        """Everything since the last call, in order; None at the end."""
        await self._filled.wait()
        with self._lock:
            self._filled.clear()
            tokens, self._tokens = tuple(self._tokens), []
        if self._closed:
            self._filled.set()
            if not tokens:
                return None
        return StepMessage(tokens, self._load)

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:  # the reader's loop is gone, and the reader with it
            self._closed = True

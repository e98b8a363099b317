"""How each end of a connection knows that the other one is there, though nothing is said for a while: it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

_ASKED = 4  # times within the silence that is borne


@asynccontextmanager
async def attending(ask: Callable[[], Awaitable[None]], silent_s: float) -> AsyncIterator[None]:
    """While the block runs `ask` is called again and again. The block ends with ConnectionError once no call was
    answered for `silent_s` seconds: a process that is stopped, and a network that is cut, raise nothing by
    themselves."""
    now = asyncio.get_running_loop().time

    async def keep_asking() -> None:
        while True:
            with suppress(ConnectionError):  # what the block waits for tells of it, too
                await ask()
                patience.reschedule(now() + silent_s)
            await asyncio.sleep(silent_s / _ASKED)

    try:
        async with asyncio.timeout(silent_s) as patience:
            asking = asyncio.get_running_loop().create_task(keep_asking())
            try:
                yield
            finally:
                asking.cancel()
    except TimeoutError:
        raise ConnectionError(f"it has been silent for {silent_s:g} s") from None

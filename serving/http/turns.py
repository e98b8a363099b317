"""Whose request works next: a tenant's requests take turns at the threads that all tenants share."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

from polygraft.cluster.model import TenantId

_AT_ONCE = 4  # of the server's 40 threads; more would only wait for the interpreter
P = ParamSpec("P")
R = TypeVar("R")


class Turns:
    """At most `at_once` requests of a tenant read the store or compute at the same time; the next wait in order, and
    nobody else for them. All on one event loop."""

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._of: defaultdict[TenantId, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(at_once))

    def of(self, tenant: TenantId) -> asyncio.Semaphore:
        """To be held, by `async with`, while the tenant's request works."""
        return self._of[tenant]

    async def work(self, tenant: TenantId, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function returns or raises, called in a thread in the tenant's turn."""
        async with self.of(tenant):
            return await run_in_threadpool(function, *args, **kwargs)

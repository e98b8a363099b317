"""A replica behind the name of its actor, and the connection that this one tells of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import ray
from ray.actor import ActorHandle

from polygraft.cluster.model import GraftId, Replica
from polygraft.serving.channel import Address, Connection, connected
from polygraft.serving.host import NAMESPACE, Host
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.request import GenerationRequest


class ActorLink:
    """The `Link` of an ingress deployment. The name is that of one process, and the connection goes there: what is
    asked of a replica that is gone fails at once, and is never sent elsewhere. Whatever Ray raises means that the
    replica is out of reach; what its own code raised over a request is that request's failure alone."""

    def __init__(self, replica: Replica) -> None:
        self._name = replica.actor
        self._found: ActorHandle[Host] | None = None
        self._connection: Connection | None = None  # the newest

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        return await self._connected.submit(request)

    async def cancel(self, request: str) -> None:
        await self._connected.cancel(request)

    async def warm(self, graft: GraftId) -> None:
        actor = await self._actor()
        try:
            await actor.warm.remote(graft)
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    async def attend(self, ingress: str) -> None:
        actor = await self._actor()
        try:
            await actor.attend.remote(ingress)
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        """By a connection, which requests and cancels go by, too; leaving the loop ends it."""
        actor = await self._actor()
        try:
            address = cast(Address, await actor.address.remote())
            self._connection = await connected(address, ingress)
            async with aclosing(self._connection.messages()) as messages:
                async for message in messages:
                    yield message
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    @property
    def _connected(self) -> Connection:
        if self._connection is None:
            raise ConnectionError("its messages were never asked for")
        return self._connection

    async def _actor(self) -> ActorHandle[Host]:
        if self._found is None:
            try:
                found = await asyncio.to_thread(ray.get_actor, self._name, namespace=NAMESPACE)
            except Exception as error:
                raise ConnectionError(_reason(error)) from error
            self._found = cast(ActorHandle[Host], found)
        return self._found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"

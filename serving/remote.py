"""A replica behind a Ray Serve handle."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from polygraft.cluster.model import GraftId
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.sequence import GenerationRequest


class ServeLink:
    """The `Link` of an ingress deployment. Whatever Ray raises means that the replica is out of reach; what the
    replica's own code raised over a request is that request's failure alone."""

    def __init__(self, handle: DeploymentHandle[object]) -> None:
        self._handle = handle

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        try:
            return cast(QueueFull | Draining | None, await self._handle.submit.remote(request))
        except Exception as error:
            if isinstance(error, RayTaskError) and not isinstance(error, (ConnectionError, RayActorError)):
                raise RuntimeError(_reason(error)) from error
            raise ConnectionError(_reason(error)) from error

    async def cancel(self, request: str) -> None:
        try:
            await self._handle.cancel.remote(request)
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    async def warm(self, graft: GraftId) -> None:
        try:
            await self._handle.warm.remote(graft)
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        """One long-lived streaming call; leaving the loop cancels it at the replica."""
        call = self._handle.options(stream=True).messages.remote(ingress)
        stream = cast(DeploymentResponseGenerator[StepMessage], call)
        try:
            async for message in stream:
                yield message
        except Exception as error:
            raise ConnectionError(_reason(error)) from error
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"

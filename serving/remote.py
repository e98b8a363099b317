"""A replica behind a Ray Serve handle."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from polygraft.serving.messages import StepMessage
from polygraft.serving.sequence import GenerationRequest


class ServeLink:
    """The `Link` of an ingress deployment. Whatever Ray raises means that the replica is out of reach."""

    def __init__(self, handle: DeploymentHandle[object]) -> None:
        self._handle = handle

    async def submit(self, request: GenerationRequest) -> bool:
        try:
            return bool(await self._handle.submit.remote(request))
        except Exception as error:
            raise ConnectionError(_reason(error)) from error

    async def cancel(self, request: str) -> None:
        try:
            await self._handle.cancel.remote(request)
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

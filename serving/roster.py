"""What an ingress knows of its replicas: who is connected, how busy each is, and who is going."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.policy.routing import Refusal, ReplicaView, RouteRequest, RouteView, route, starting
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.blocks import BLOCK_SIZE
from polygraft.serving.messages import Load, StepMessage
from polygraft.serving.request import GenerationRequest


class Roster:
    """Replicas by their last messages. One that drains is followed, and given nothing new. All on one event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.loads: dict[ReplicaId, Load] = {}
        self.draining: set[ReplicaId] = set()
        self._sent: Counter[ReplicaId] = Counter()  # submitted since the replica's last message
        self._changed = asyncio.Event()

    def hear(self, replica: ReplicaId, message: StepMessage) -> None:
        self.loads[replica] = message.load
        self._sent[replica] = 0
        if message.draining:
            self.draining.add(replica)
        else:
            self.draining.discard(replica)
        self._changed.set()

    def forget(self, replica: ReplicaId) -> None:
        """It is not connected any more."""
        self.loads.pop(replica, None)
        self.draining.discard(replica)
        self._changed.set()

    def send(self, replica: ReplicaId) -> None:
        """A request is on its way there."""
        self._sent[replica] += 1

    def take_back(self, replica: ReplicaId) -> None:
        """It did not take the request."""
        self._sent[replica] = max(0, self._sent[replica] - 1)

    async def change(self) -> None:
        """Return when something is known that was not."""
        self._changed.clear()
        await self._changed.wait()

    def waiting(self, replica: ReplicaId) -> bool:
        """Whether requests wait there, by its last message."""
        load = self.loads.get(replica)
        return load is not None and load.waiting > 0

    def choose(self, request: GenerationRequest, tried: Collection[ReplicaId] = ()) -> ReplicaId | Refusal:
        """Who takes the request, but for those `tried` (cluster/policy/routing.py)."""
        return route(self._view(), _route_request(request, tried))

    def starting(self, request: GenerationRequest) -> ReplicaId | None:
        """Who starts the request with its next step; None where all are busy."""
        return starting(self._view(), _route_request(request, ()))

    def _view(self) -> RouteView:
        staying = [(id, load) for id, load in sorted(self.loads.items()) if id not in self.draining]
        return RouteView(
            replicas=tuple(self._replica(id, load) for id, load in staying),
            max_streams=self._settings.max_streams,
            block_size=BLOCK_SIZE,
        )

    def _replica(self, replica: ReplicaId, load: Load) -> ReplicaView:
        """The load its last message told, and what was sent since: those start as far as there are places."""
        starting = min(self._sent[replica], max(0, self._settings.max_streams - load.running - load.waiting))
        return ReplicaView(
            id=replica,
            running=load.running + starting,
            waiting=load.waiting + self._sent[replica] - starting,
            blocks=load.blocks,
            free_blocks=load.free_blocks,
            resident=load.resident,
        )


def _route_request(request: GenerationRequest, tried: Collection[ReplicaId]) -> RouteRequest:
    slots = request.prefix + len(request.prompt_ids) + len(request.generated)
    return RouteRequest(graft=request.graft, slots=slots, tried=tried, resumed=request.resumed)

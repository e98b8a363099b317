"""The ingress's side of generation: picks a replica, follows its messages, carries a stream over when it goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Set
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import replace
from functools import partial
from secrets import token_hex
from typing import Protocol

from polygraft.cluster.model import GraftId, ReplicaId, TenantId
from polygraft.cluster.policy.routing import Refusal, RefusalReason
from polygraft.cluster.policy.scaling import Demand
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.attending import attending
from polygraft.serving.inflight import InFlight, Lost
from polygraft.serving.messages import Draining, Load, QueueFull, StepMessage, StepTokens
from polygraft.serving.request import GenerationRequest
from polygraft.serving.roster import Roster

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 8  # replicas that may die under a request
_SUSPECT_FROM = 2  # deaths, after which a request waits until no other that this happened to is underway
_HAND_ON_S = 10.0  # how long a stream that moves, or its graft, may keep the next one waiting
_AHEAD = 4  # streams whose grafts are being loaded before they move
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class Busy(Exception):
    """Every replica's queue is full for this tenant; a place is free at one of them in `retry_after_s`, at its pace."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("too many of your requests wait already")
        self.retry_after_s = retry_after_s


class TooLong(Exception):
    """The prompt fits no replica, not even an empty one."""


class Unavailable(Exception):
    """No replica answers, or the one that did died too often."""


class Link(Protocol):
    """One replica as its ingress sees it. Every method raises `ConnectionError` when the replica is gone."""

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        """Queue the request, unless the replica's queue is full for its tenant, or it goes. `messages` of its ingress
        must be open."""
        ...

    async def cancel(self, request: str) -> None:
        """End the request wherever it is; no effect on one that is unknown or over."""
        ...

    async def warm(self, graft: GraftId) -> None:
        """Return when the replica has the graft in memory, or cannot take it in now."""
        ...

    async def attend(self, ingress: str) -> None:
        """Say that `ingress` is there. One that is silent for long has nobody who reads its messages: they end, and its
        requests with them."""
        ...

    def messages(self, ingress: str) -> AsyncIterator[StepMessage]:
        """What the replica has for requests of `ingress`, from now on; the first message comes at once, and the last
        when the replica has drained."""
        ...


class Fleet(Protocol):
    """Where a gateway learns of its replicas."""

    async def keep(self, gateway: Gateway) -> None:
        """Call its `follow` whenever the replicas change, for ever; its `demand` is what they are wanted for."""
        ...


class Gateway:
    """Generations over a changing set of replicas. `start` and `close` bracket its use, all on one event loop.

    A replica that says that it drains gets no new request, and its streams are handed to others: one after the other,
    each when somebody starts it at once, until its next token is there, so that a stream stands still for its own
    recomputing alone. Until its turn comes the old replica goes on with it. A request that waits at one replica goes to
    another as soon as that starts it at once.
    """

    def __init__(
        self,
        links: Mapping[ReplicaId, Link],
        *,
        ingress: str,
        settings: ServeSettings,
        ready_s: float = 60.0,
        fleet: Fleet | None = None,
    ) -> None:
        """`links` are the replicas until `fleet` says otherwise; `ready_s` is how long a request waits for one where
        there is none. Replicas know each gateway of an ingress by a name of its own, under which they tell one."""
        self._links, self._fleet = dict(links), fleet
        self.name = f"{ingress}-{token_hex(4)}"
        self._ready_s, self._silent_s = ready_s, settings.silent_s
        self._roster = Roster(settings)
        self._streams: dict[str, InFlight] = {}
        self._suspect = asyncio.Lock()  # held by the one request of many deaths that is underway
        self._pumps: dict[ReplicaId, asyncio.Task[None]] = {}
        self._movers: dict[ReplicaId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._balancing: asyncio.Task[None] | None = None
        self._context = Context()

    async def start(self) -> None:
        # Later tasks run in this context, not in that of the request they were made in: Serve cancels what a request
        # started when its client hangs up, and that is just when the engine must be told.
        self._context = copy_context()
        for replica in self._links:
            self._connect(replica)
        self._balancing = self._spawn(self._balance())
        if self._fleet is not None:
            self._spawn(self._fleet.keep(self))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def follow(self, links: Mapping[ReplicaId, Link]) -> None:
        """These are the replicas now. One that is not among them any more is gone as planned; one that was there
        before keeps its link."""
        for replica in self._links.keys() - links.keys():
            del self._links[replica]
            self._pumps.pop(replica).cancel()
            self._lose(replica, planned=True)
        for replica in links.keys() - self._links.keys():
            self._links[replica] = links[replica]
            self._connect(replica)

    @property
    def demand(self) -> Demand:
        """The requests that replicas have, and those that wait for a replica to be there."""
        having = sum(bool(stream.live) for stream in self._streams.values())
        return Demand(having, len(self._streams) - having)

    def ready(self) -> bool:
        """Whether a replica is connected."""
        return bool(self._roster.loads)

    @property
    def loads(self) -> Mapping[ReplicaId, Load]:
        """What each replica that is connected said of itself last. May be read from any thread."""
        return dict(self._roster.loads)

    @property
    def used(self) -> Set[tuple[TenantId, GraftId]]:
        """Whose answers are being generated with which grafts. May be read from any thread."""
        return {(one.request.tenant, one.request.graft) for one in list(self._streams.values()) if one.request.graft}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepTokens, None]:
        """The request's tokens in order, each once, the last with its finish reason; leaving the loop early cancels it.

        Raises Busy and TooLong before the first token, Unavailable at any time.
        """
        stream = InFlight(replace(request, ingress=self.name))
        self._streams[request.id] = stream
        try:
            await self._submit(stream)
            finished = False
            while not finished:
                said = await stream.arrived.get()
                while isinstance(said, Lost):
                    said = await self._resume(stream, said)
                finished = said.finish_reason is not None
                yield said
        finally:
            self._streams.pop(request.id, None)
            if not stream.over:
                stream.heard.set()
                for replica in set(stream.live.values()):
                    self._cancel(replica, request.id)

    async def _submit(self, stream: InFlight) -> None:
        """Queue the stream's newest attempt at the first replica that takes it."""
        full: dict[ReplicaId, float] = {}
        request = stream.request
        until = asyncio.get_running_loop().time() + self._ready_s
        while True:
            replica = self._roster.choose(request, full)
            if isinstance(replica, Refusal):
                await self._wait_or_raise(request, replica.reason, full, until)
                continue
            match await self._offer(stream, replica):
                case None:
                    return
                case QueueFull(seconds):
                    full[replica] = seconds

    async def _offer(self, stream: InFlight, replica: ReplicaId) -> QueueFull | Draining | None:
        """Ask `replica` to take the newest attempt. None: it has it, or whoever withdrew the attempt meanwhile goes on.
        Draining: the replica goes or is gone, which the roster knows from now on."""
        request = stream.request
        stream.live[request.attempt] = replica  # before the call: its first token may overtake the answer
        self._roster.send(replica)
        answer: QueueFull | Draining | None = Draining()
        broken: Exception | None = None
        try:
            async with asyncio.timeout(self._silent_s):
                answer = await self._links[replica].submit(request)
        except (ConnectionError, TimeoutError) as error:
            broken = error
        if answer is None:
            return None
        ours = stream.live.get(request.attempt) == replica
        if ours:
            del stream.live[request.attempt]
        self._roster.take_back(replica)
        if broken is not None:
            _LOG.warning("replica %s took no request: %s", replica, broken)
            self._lose(replica, planned=replica in self._roster.draining)
            self._connect(replica)
        elif isinstance(answer, Draining):
            self._roster.draining.add(replica)
        return answer if ours else None

    async def _wait_or_raise(
        self, request: GenerationRequest, reason: RefusalReason, full: dict[ReplicaId, float], until: float
    ) -> None:
        match reason:
            case RefusalReason.NO_REPLICA:
                try:
                    async with asyncio.timeout_at(until):
                        await self._roster.change()
                except TimeoutError:
                    raise Unavailable(f"no replica came up within {self._ready_s:.0f} s") from None
            case RefusalReason.TOO_LONG:
                raise TooLong("the prompt does not fit the key-value cache of any replica")
            case RefusalReason.ALL_FULL if not request.resumed:
                raise Busy(min(full.values()))
            case RefusalReason.ALL_FULL:  # those that have it only refuse it while they stop
                await asyncio.sleep(min(full.values()))
                full.clear()

    async def _resume(self, stream: InFlight, lost: Lost) -> StepTokens | Lost:
        """Submit what is left of a stream whose replica is gone, as its next attempt; returns what came of that first.

        Replicas that die may die of one of their requests. So those that several died under are submitted one at a
        time, each until its replica has said something of it or died again: then it is given up, and it alone. One
        whose replica went because it was told to has lost nothing.
        """
        stream.deaths += not lost.planned
        if stream.deaths >= _ATTEMPTS:
            raise Unavailable(f"the replica died {_ATTEMPTS} times during this request")
        stream.advance()
        request = stream.request
        _LOG.warning("request %s continues at token %d as attempt %d", request.id, len(stream.tokens), request.attempt)
        if stream.deaths < _SUSPECT_FROM:
            await self._submit(stream)
            return await stream.arrived.get()
        async with self._suspect:
            await self._submit(stream)
            with suppress(TimeoutError):  # it may only be waiting for its turn
                async with asyncio.timeout(self._ready_s):
                    first = await stream.arrived.get()
                    if first == Lost(planned=False):
                        raise Unavailable(
                            f"{stream.deaths + 1} replicas died during this request, the last "
                            "while it was tried by itself"
                        )
                    return first
        return await stream.arrived.get()

    async def _hand_on(self, replica: ReplicaId) -> None:
        """Move the streams of a replica that drains: first those that it has said nothing of, to any queue, then the
        others, one by one, to where their grafts are in memory before they leave."""
        warm: dict[tuple[ReplicaId, GraftId], asyncio.Task[None]] = {}
        while moving := [stream for stream in self._streams.values() if stream.only_at(replica)]:
            moving.sort(key=lambda stream: len(stream.tokens) > 0)
            for place, stream in enumerate(moving):
                if (target := self._elsewhere(stream)) is None:
                    continue
                if stream.tokens:
                    grafts = [one.request.graft for one in moving[place:][:_AHEAD]]
                    for key in [(target, graft) for graft in grafts if graft is not None]:
                        warm[key] = warm.get(key) or self._spawn(self._warm(*key))
                    if grafts[0] is not None and not (loading := warm[target, grafts[0]]).done():
                        await asyncio.wait({loading})
                        break
                if await self._move(stream, replica, target):
                    break
            else:
                await self._roster.change()

    async def _balance(self) -> None:
        """Move requests that wait at one replica to another that starts them at once, as a new one does, for ever:
        those that came last first, a request a change, by when it is known again who waits where."""
        while True:
            await self._roster.change()
            for stream in reversed(list(self._streams.values())):
                if stream.tokens or len(stream.live) != 1 or stream.over:
                    continue
                (source,) = stream.live.values()
                if not self._roster.waiting(source) or source in self._roster.draining:
                    continue
                target = self._roster.starting(stream.next())
                if target is not None and target != source:
                    await self._move(stream, source, target)
                    break

    async def _warm(self, replica: ReplicaId, graft: GraftId) -> None:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_HAND_ON_S):
                await self._links[replica].warm(graft)

    def _elsewhere(self, stream: InFlight) -> ReplicaId | None:
        if stream.tokens:
            return self._roster.starting(stream.next())
        found = self._roster.choose(stream.next())
        return None if isinstance(found, Refusal) else found

    async def _move(self, stream: InFlight, source: ReplicaId, target: ReplicaId) -> bool:
        """Hand one stream on; False where `target` does not take it, and `source` goes on with it."""
        had = [attempt for attempt, at in stream.live.items() if at == source]
        stream.advance()
        request = stream.request
        try:
            refused = await self._offer(stream, target) is not None
        except RuntimeError as error:  # the replica's own code raised over it
            _LOG.warning("request %s does not move to %s: %s", request.id, target, error)
            stream.live.pop(request.attempt, None)
            refused = True
        if refused:
            if not stream.live and not stream.over:  # the old replica has gone meanwhile
                stream.arrived.put_nowait(Lost(planned=True))
            return False
        if stream.over or request.id not in self._streams:
            self._cancel(target, request.id)
            return True
        if request.attempt not in stream.live:  # the new one has gone
            return False
        if [attempt for attempt in had if stream.live.pop(attempt, None) is not None]:
            self._cancel(source, request.id)
        _LOG.info("request %s moves from %s to %s at token %d", request.id, source, target, len(request.generated))
        if request.generated:
            with suppress(TimeoutError):
                async with asyncio.timeout(_HAND_ON_S):
                    await stream.heard.wait()
        return True

    async def _pump(self, replica: ReplicaId) -> None:
        """Follow one replica's messages for ever, reconnecting when they end, or when it does not answer any more."""
        failures = 0
        while True:
            link = self._links[replica]
            try:
                async with attending(partial(link.attend, self.name), self._silent_s):
                    async for message in link.messages(self.name):
                        failures = 0
                        self._hear(replica, message)
            except ConnectionError as error:
                _LOG.warning("replica %s: %s", replica, error)
            self._lose(replica, planned=replica in self._roster.draining)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    def _hear(self, replica: ReplicaId, message: StepMessage) -> None:
        self._roster.hear(replica, message)
        for said in message.tokens:
            if (stream := self._streams.get(said.request)) is not None:
                stream.accept(replica, said)
        if message.draining and replica not in self._movers:
            self._movers[replica] = self._spawn(self._hand_on(replica))
            self._movers[replica].add_done_callback(lambda _: self._movers.pop(replica, None))

    def _lose(self, replica: ReplicaId, *, planned: bool) -> None:
        self._roster.forget(replica)
        for stream in self._streams.values():
            stream.lose(replica, planned=planned)

    def _cancel(self, replica: ReplicaId, request: str) -> None:
        async def cancel(link: Link) -> None:
            with suppress(ConnectionError):  # the replica is gone, and the request with it
                await link.cancel(request)

        if (link := self._links.get(replica)) is not None:
            self._spawn(cancel(link))

    def _connect(self, replica: ReplicaId) -> None:
        """Follow the replica's messages, from a new connection."""
        if replica in self._pumps:
            self._pumps[replica].cancel()
        self._pumps[replica] = self._spawn(self._pump(replica))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

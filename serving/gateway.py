"""The ingress's side of generation: picks a replica, follows its messages, carries a stream over when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from typing import Protocol

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.policy.routing import Refusal, RefusalReason, ReplicaView, RouteRequest, RouteView, route
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.blocks import BLOCK_SIZE
from polygraft.serving.messages import Load, QueueFull, StepMessage, StepTokens
from polygraft.serving.sequence import GenerationRequest

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 8
_TOGETHER = 2  # attempts, after which whose replicas died is submitted apart from others that this happened to
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

    async def submit(self, request: GenerationRequest) -> QueueFull | None:
        """Queue the request, unless the replica's queue is full for its tenant. `messages` of its ingress must be
        open."""
        ...

    async def cancel(self, request: str) -> None:
        """End the request wherever it is; no effect on one that is unknown or over."""
        ...

    def messages(self, ingress: str) -> AsyncIterator[StepMessage]:
        """What the replica has for requests of `ingress`, from now on; the first message comes at once."""
        ...


@dataclass(slots=True)
class _Stream:
    """A request in flight: the attempt that counts, the tokens handed out, and what arrived (None: replica lost)."""

    request: GenerationRequest
    replica: ReplicaId
    tokens: list[int] = field(default_factory=list)
    arrived: asyncio.Queue[StepTokens | None] = field(default_factory=asyncio.Queue)


class Gateway:
    """Generations over a set of replicas. `start` and `close` bracket its use, all on one event loop."""

    def __init__(
        self, links: Mapping[ReplicaId, Link], *, ingress: str, settings: ServeSettings, ready_s: float = 60.0
    ) -> None:
        self._links = dict(links)
        self._ingress = ingress
        self._settings = settings
        self._ready_s = ready_s
        self._streams: dict[str, _Stream] = {}
        self._loads: dict[ReplicaId, Load] = {}
        self._sent: Counter[ReplicaId] = Counter()  # submitted since the replica's last message
        self._changed = asyncio.Event()
        self._apart = asyncio.Lock()  # held by the request that is tried apart
        self._pumps: dict[ReplicaId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = Context()

    async def start(self) -> None:
        # Later tasks run in this context, not in that of the request they were made in: Serve cancels what a request
        # started when its client hangs up, and that is just when the engine must be told.
        self._context = copy_context()
        for replica in self._links:
            self._connect(replica)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ready(self) -> bool:
        """Whether a replica is connected."""
        return bool(self._loads)

    @property
    def loads(self) -> Mapping[ReplicaId, Load]:
        """What each replica that is connected said of itself last. May be read from any thread."""
        return dict(self._loads)

    def uses(self, graft: GraftId) -> bool:
        """Whether an answer is being generated with the graft. May be called from any thread."""
        return any(stream.request.graft == graft for stream in list(self._streams.values()))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepTokens, None]:
        """The request's tokens in order, each once, the last with its finish reason; leaving the loop early cancels it.

        Raises Busy and TooLong before the first token, Unavailable at any time.
        """
        stream = await self._submit(_Stream(replace(request, ingress=self._ingress), ReplicaId("")))
        finished = False
        try:
            while not finished:
                tokens = await stream.arrived.get()
                while tokens is None:
                    tokens = await self._resume(stream)
                # An older attempt's words and repetitions are dropped: (request, choice, index) is published once.
                if tokens.attempt != stream.request.attempt or tokens.index < len(stream.tokens):
                    continue
                if tokens.index > len(stream.tokens):  # a message was lost, and with it the tokens before this one
                    stream.arrived.put_nowait(None)
                    continue
                if tokens.token is not None:
                    stream.tokens.append(tokens.token)
                finished = tokens.finish_reason is not None
                yield tokens
        finally:
            self._streams.pop(request.id, None)
            if not finished:
                self._spawn(self._cancel(stream))

    async def _submit(self, stream: _Stream) -> _Stream:
        """Queue the stream's request at the first replica that takes it."""
        full: dict[ReplicaId, float] = {}
        request = stream.request
        try:
            async with asyncio.timeout(self._ready_s):
                while True:
                    replica = self._choose(request, full)
                    if isinstance(replica, Refusal):
                        await self._wait_or_raise(replica.reason, full)
                        continue
                    stream.replica, stream.arrived = replica, asyncio.Queue()
                    self._streams[request.id] = stream  # before the call: its first token may overtake the answer
                    self._sent[replica] += 1
                    try:
                        refused = await self._links[replica].submit(request)
                        if refused is None:
                            return stream
                        full[replica] = refused.retry_after_s
                        self._sent[replica] -= 1
                    except ConnectionError as error:
                        _LOG.warning("replica %s took no request: %s", replica, error)
                        self._lose(replica)
                        self._connect(replica)
        except TimeoutError:
            self._forget(stream)
            raise Unavailable(f"no replica came up within {self._ready_s:.0f} s") from None
        except BaseException:
            self._forget(stream)
            raise

    def _forget(self, stream: _Stream) -> None:
        """Give up a submission; if it was under way (a client that hung up), the replica may have got it."""
        if self._streams.pop(stream.request.id, None) is not None:
            self._spawn(self._cancel(stream))

    async def _resume(self, stream: _Stream) -> StepTokens | None:
        """Submit what is left of a stream whose replica is gone, as its next attempt; returns what came of that first.

        Replicas that die may die of one of their requests. So those that several died under are submitted one at a
        time, each until its replica has said something of it or died again: then it is given up, and it alone.
        """
        request = stream.request
        if request.attempt + 1 >= _ATTEMPTS:
            raise Unavailable(f"the replica died {_ATTEMPTS} times during this request")
        stream.request = replace(request, attempt=request.attempt + 1, generated=tuple(stream.tokens))
        _LOG.warning(
            "request %s continues at token %d as attempt %d", request.id, len(stream.tokens), stream.request.attempt
        )
        if stream.request.attempt < _TOGETHER:
            await self._submit(stream)
            return await stream.arrived.get()
        async with self._apart:
            await self._submit(stream)
            with suppress(TimeoutError):  # it may only be waiting for its turn
                async with asyncio.timeout(self._ready_s):
                    if (first := await stream.arrived.get()) is None:
                        raise Unavailable(
                            f"{stream.request.attempt + 1} replicas died during this request, the last "
                            "while it was tried apart from others"
                        )
                    return first
        return await stream.arrived.get()

    def _choose(self, request: GenerationRequest, tried: Collection[ReplicaId]) -> ReplicaId | Refusal:
        view = RouteView(
            replicas=tuple(self._view(replica, load) for replica, load in sorted(self._loads.items())),
            max_streams=self._settings.max_streams,
            block_size=BLOCK_SIZE,
        )
        slots = request.prefix + len(request.prompt_ids) + len(request.generated)
        return route(view, RouteRequest(graft=request.graft, slots=slots, tried=tried))

    def _view(self, replica: ReplicaId, load: Load) -> ReplicaView:
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

    async def _wait_or_raise(self, reason: RefusalReason, full: Mapping[ReplicaId, float]) -> None:
        match reason:
            case RefusalReason.NO_REPLICA:
                self._changed.clear()
                await self._changed.wait()
            case RefusalReason.TOO_LONG:
                raise TooLong("the prompt does not fit the key-value cache of any replica")
            case RefusalReason.ALL_FULL:
                raise Busy(min(full.values()))

    async def _pump(self, replica: ReplicaId) -> None:
        """Follow one replica's messages for ever, reconnecting when they end."""
        failures = 0
        while True:
            try:
                async for message in self._links[replica].messages(self._ingress):
                    failures = 0
                    self._loads[replica] = message.load
                    self._sent[replica] = 0
                    self._changed.set()
                    for tokens in message.tokens:
                        stream = self._streams.get(tokens.request)
                        if stream is not None and stream.replica == replica:
                            stream.arrived.put_nowait(tokens)
            except ConnectionError as error:
                _LOG.warning("replica %s: %s", replica, error)
            self._lose(replica)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    def _lose(self, replica: ReplicaId) -> None:
        self._loads.pop(replica, None)
        for stream in self._streams.values():
            if stream.replica == replica:
                stream.arrived.put_nowait(None)

    async def _cancel(self, stream: _Stream) -> None:
        with suppress(ConnectionError):  # the replica is gone, and the request with it
            await self._links[stream.replica].cancel(stream.request.id)

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

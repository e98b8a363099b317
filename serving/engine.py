"""The engine: one thread that computes all streams of a replica together, a step at a time. It knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Condition, Thread

import torch
from torch import Tensor

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.policy.batching import Running, Waiting, admit_streams, ever_fits
from polygraft.cluster.settings import ServeSettings
from polygraft.cluster.store.base import JSON
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention
from polygraft.serving.batch import Batch, Chunk
from polygraft.serving.blocks import BLOCK_SIZE, Blocks
from polygraft.serving.loading import Loader
from polygraft.serving.messages import FinishReason, Load, StepTokens
from polygraft.serving.outbox import Listener, Outbox
from polygraft.serving.residency import Composition, GraftUnusable, Residency
from polygraft.serving.sampling import Draw, sample
from polygraft.serving.sequence import GenerationRequest, Sequence
from polygraft.serving.steps import StepLog

_LOG = logging.getLogger(__name__)
_IDLE_S = 0.5  # how long an idle engine sleeps before it shows that it is alive
_GIVE_UP = 10  # failures outside any forward, in a row, after which the thread ends and the replica is unhealthy


class Engine:
    """Continuous batching of any mix of grafts and the bare backbone. All methods may be called from any thread.

    A failure belongs to whom it can be pinned on: a graft that cannot be loaded or a row that is not finite ends that
    request; when a forward raises, its streams are computed one by one until the culprit raises alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: ServeSettings,
        *,
        replica: ReplicaId,
        data: Path,
        graft_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`clock` orders arrivals and beats, `now` stamps the step log. Raises ValueError for a cache below one context."""
        per_block = KVCache.bytes_per_block(backbone.shape, BLOCK_SIZE, backbone.dtype)
        count = settings.kv_bytes // per_block
        if not ever_fits(settings.max_context, blocks=count - 1, block_size=BLOCK_SIZE):
            raise ValueError(
                f"serve.kv_bytes: {settings.kv_bytes} is less than one context of {settings.max_context} tokens needs; "
                f"give at least {(-(-settings.max_context // BLOCK_SIZE) + 2) * per_block}"
            )
        self._backbone, self._settings, self._clock, self._now = backbone, settings, clock, now
        self._cache = KVCache(backbone.shape, count, block_size=BLOCK_SIZE, dtype=backbone.dtype)
        self._blocks = Blocks(count=count, block_size=BLOCK_SIZE, bytes_per_block=per_block)
        self._residency = Residency(folder=data / "grafts", backbone=backbone, budget_bytes=graft_bytes)
        self._loader = Loader(self._residency, wake=self._wake)
        self._log = StepLog(data / "replicas" / replica / "steps.jsonl")
        self._outbox = Outbox()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._suspects: list[Sequence] = []
        self._computing: Batch | None = None
        self._composition: Composition | None = None
        self._steps = 0
        self._changed = Condition()
        self._submitted: list[Sequence] = []
        self._cancelled: set[str] = set()
        self._stopping = False
        self.beat = clock()
        self._thread = Thread(target=self._run, name=f"engine-{replica}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its step; requests that are not over end as cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._loader.close()
        self._log.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> Load:
        waiting = len(self._waiting) + len(self._submitted)
        free = self._blocks.free_blocks
        return Load(len(self._running), waiting, self._blocks.total, free, self._residency.held)

    def listen(self, ingress: str, listener: Listener) -> None:
        """Hand `ingress` its tokens from now on; its requests of an earlier listener are another attempt's by now."""
        self._outbox.listen(ingress, listener)

    def leave(self, ingress: str, listener: Listener) -> None:
        """The reader is gone; unless another took its place, so are its requests."""
        if self._outbox.leave(ingress, listener):
            with self._changed:
                of_ingress = [s for s in (*self._submitted, *self._waiting, *self._running) if s.request.ingress == ingress]
                self._cancelled |= {sequence.request.id for sequence in of_ingress}
                self._changed.notify()

    def submit(self, request: GenerationRequest) -> bool:
        """Queue the request; False when the queue is full. A newer attempt replaces an older one of the same id."""
        with self._changed:
            places = self._settings.max_streams + self._settings.max_queued
            if self._stopping or len(self._running) + len(self._waiting) + len(self._submitted) >= places:
                return False
            self._submitted.append(Sequence(request=request, arrival=self._clock()))
            self._changed.notify()
            return True

    def cancel(self, request: str) -> None:
        """End the request wherever it is; one that is unknown or over is left alone."""
        with self._changed:
            self._cancelled.add(request)
            self._changed.notify()

    def step(self) -> bool:
        """One forward over whatever can run; False when nothing can."""
        batch = self._schedule()
        if batch is None:
            return False
        logits = self._forward(batch)
        tokens = self._sample(batch, logits)
        self._collect(batch, tokens)
        return True

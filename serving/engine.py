"""The engine: one thread that computes all streams of a replica together, a step at a time. It knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Thread

import torch
from torch import Tensor

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.cluster.store.base import JSON
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import PagedAttention
from polygraft.grafts.runtime.process import allocation_failed, unfit
from polygraft.serving.batch import Batch, Chunk
from polygraft.serving.labels import Probabilities, probabilities
from polygraft.serving.loading import Loader
from polygraft.serving.messages import ErrorCode, FinishReason, QueueFull, StepTokens
from polygraft.serving.outbox import Listener, Outbox
from polygraft.serving.request import GenerationRequest
from polygraft.serving.residency import GraftUnusable, Residency
from polygraft.serving.sampling import sample
from polygraft.serving.sequence import Sequence
from polygraft.serving.steps import StepLog
from polygraft.serving.streams import ContextExceeded, Streams, WrongUse
from polygraft.serving.suspects import Suspects

_LOG = logging.getLogger(__name__)
_IDLE_S = 0.5  # how long an idle engine sleeps before it shows that it is alive
_GIVE_UP = 10  # turns in a row that fail outside any forward, after which the thread ends
_STOPPING_S = 2.0  # after which one may ask again an engine that is stopping, or its successor


class UnknownToken(Exception):
    """A request with a token that the backbone does not have."""


class NotFinite(Exception):
    """A row of logits that holds a NaN or an infinity."""


class Engine:
    """Continuous batching of any mix of grafts and the bare backbone. Public methods may be called from any thread.

    A failure belongs to whom it can be pinned on, and ends that request alone: what is done stream by stream is caught
    stream by stream; where a step over several raises, they are computed in halves until the culprit is alone
    (suspects.py).
    """

    def __init__(  # noqa: PLR0913
        self,
        backbone: Backbone,
        settings: ServeSettings,
        *,
        replica: ReplicaId,
        data: Path,
        graft_bytes: int = 1 << 30,
        step_floor_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`clock` orders arrivals and beats, `now` stamps the step log; a step of the thread takes at least
        `step_floor_s` seconds. Raises ValueError as `Streams` does."""
        self._step_floor_s = step_floor_s
        self._backbone, self._settings, self._clock, self._now = backbone, settings, clock, now
        residency = Residency(folder=Folders(data).grafts, backbone=backbone, budget_bytes=graft_bytes)
        self._loader = Loader(residency, wake=self._wake)
        self._streams = Streams(backbone, settings, residency, self._loader)
        self._log = StepLog(data / "replicas" / replica)
        self._outbox = Outbox()
        self._computing: tuple[Chunk, ...] = ()  # of the step that goes on
        self._suspects = Suspects()
        self._failures = 0
        self._steps = 0
        # Shared with other threads, under the condition's lock.
        self._changed = Condition()
        self._awake = False
        self._submitted: list[Sequence] = []
        self._cancelled: set[str] = set()
        self._left: set[str] = set()
        self._expected: dict[GraftId, None] = {}
        self._stopping = False
        # Replaced whole, so that any thread may read them.
        self.load = self._streams.load
        self.beat = clock()
        self._thread = Thread(target=self._run, name=f"engine-{replica}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its step; requests that are not over end as cancelled."""
        with self._changed:
            self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        else:
            self._log.close()
        self._loader.close()

    def healthy(self, stall_s: float) -> bool:
        """Whether the thread lives and has begun a turn within `stall_s` seconds."""
        return self._thread.is_alive() and self._clock() - self.beat < stall_s

    def listen(self, ingress: str, listener: Listener) -> None:
        """Hand `ingress` its tokens from now on, on the engine's thread."""
        self._outbox.listen(ingress, listener)

    def hears(self, ingress: str) -> bool:
        """Whether `ingress` has a listener."""
        return self._outbox.hears(ingress)

    def leave(self, ingress: str, listener: Listener) -> bool:
        """The reader is gone; unless another took its place, which False says, its requests end."""
        left = self._outbox.leave(ingress, listener)
        if left:
            with self._changed:
                self._left.add(ingress)
            self._wake()
        return left

    def submit(self, request: GenerationRequest) -> QueueFull | None:
        """Queue the request, unless the queue is full for its tenant. A newer attempt ends an older one of its id, and
        is not refused: it has been accepted once."""
        with self._changed:
            if self._stopping:
                return QueueFull(_STOPPING_S)
            now = self._clock()
            present = (*self._present(), *self._submitted)
            full = None if request.resumed else self._streams.tenants.refusal(request.tenant, present, now)
            if full is not None:
                return full
            self._submitted.append(Sequence(request=request, arrival=now))
        self._wake()
        return None

    def idle(self) -> bool:
        """Whether it has no request, by the end of its last step."""
        with self._changed:
            return not self._submitted and not self.load.running and not self.load.waiting

    def cancel(self, request: str) -> None:
        """End the request wherever it is; one that is unknown or over is left alone."""
        with self._changed:
            self._cancelled.add(request)
        self._wake()

    def expect(self, graft: GraftId) -> None:
        """Bring the graft in, where there is room for it: a stream that another replica has is to come here."""
        with self._changed:
            self._expected[graft] = None
        self._wake()

    def expects(self, graft: GraftId) -> bool:
        """Whether it is still being read."""
        with self._changed:
            return graft in self._expected or graft in self._streams.expected

    def turn(self) -> bool:
        """A step, and handing out what came of it; False when there was nothing to do. The thread's whole life."""
        self.beat = self._clock()
        with torch.inference_mode():
            try:
                busy = self.step()
                self._failures = 0
            except Exception as error:
                busy = True
                self._blame(error)
        self.load = self._streams.load
        self._outbox.flush(self.load, self._clock())
        return busy

    def step(self) -> bool:
        """One forward over whatever can run; False when nothing can."""
        batch = self._schedule()
        if batch is None:
            return False
        logits, labels = self._forward(batch)
        tokens = self._sample(batch, logits)
        self._collect(batch, tokens, labels)
        self._streams.stepped(len(batch.rows), self._clock() - self.beat)
        return True

    def _schedule(self) -> Batch | None:
        """Take in what came, and lay out the rows of the next forward; None when there are none."""
        self._take_in()
        chunks = self._suspects.next()
        if not chunks:
            now = self._clock()
            failed = self._streams.load_grafts(now)
            chosen, more = self._streams.choose(now)
            for sequence, error in (*failed, *more):
                self._fail(sequence, error)
            chunks = tuple(chosen)
        if not chunks:
            return None
        self._computing = chunks
        grafts = {chunk.sequence.request.graft for chunk in chunks}
        composition = self._streams.residency.compose([graft for graft in grafts if graft is not None])
        tables = {chunk.sequence.request.id: self._streams.blocks.table(chunk.sequence.request.id) for chunk in chunks}
        return Batch.of(chunks, tables, composition)

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Probabilities | None]]:
        """Logits of the rows to sample, [n, vocab] fp32, and what texts that are read to their ends are."""
        attention = PagedAttention(self._streams.cache, batch.sequences)
        hidden = self._backbone.forward(batch.rows, batch.stacks, attention)
        labels = probabilities(hidden, batch)
        if not batch.last:  # prefill that goes on
            return hidden.new_empty(0, self._backbone.shape.vocab, dtype=torch.float32), labels
        every = len(batch.last) == len(batch.rows)  # while all decode: no list of rows goes to the device
        return self._backbone.logits(hidden if every else hidden[list(batch.last)]), labels

    def _sample(self, batch: Batch, logits: Tensor) -> list[int | None]:
        """A token for each sequence of `batch.sampled`; None where its row is not finite."""
        return sample(logits, batch.draws)

    def _collect(self, batch: Batch, tokens: list[int | None], labels: list[Probabilities | None]) -> None:
        """Note what is computed, hand out tokens and labels (None: a row was not finite), and end what is over."""
        self._computing = ()
        self._note(batch)
        for chunk in batch.chunks:
            chunk.sequence.computed += chunk.rows
            self._suspects.acquit(chunk.sequence)
        told = zip((*batch.sampled, *batch.classified), (*tokens, *labels), strict=True)
        for sequence, found in told:
            try:
                self._say(sequence, found)
            except Exception as error:
                self._fail(sequence, error)
        self._streams.tenants.said(batch.sampled)

    def _say(self, sequence: Sequence, token: int | Probabilities | None) -> None:
        """Hand out its next token, or end it, with its labels' probabilities where it classifies."""
        if token is None:
            raise NotFinite("the model's output is not finite")
        if isinstance(token, tuple):
            self._end(sequence, "stop", probabilities=token)
            return
        reason = sequence.finish_reason(token)
        sequence.tokens.append(token)
        if reason is None:
            self._tell(sequence, token, None)
        else:
            self._end(sequence, reason, token=token)

    def _take_in(self) -> None:
        """What other threads asked for since the last step; cancels come last, so that they meet what they are for."""
        with self._changed:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, set()
            left, self._left = self._left, set()
            self._streams.expected |= self._expected
            self._expected.clear()
        newer = {sequence.request.id: sequence for sequence in submitted}
        for sequence in self._present():
            if sequence.request.id in newer or sequence.request.ingress in left:
                self._end(sequence, "cancelled")
        for sequence in submitted:
            if newer[sequence.request.id] is not sequence:
                self._tell(sequence, None, "cancelled")
                continue
            self._streams.add(sequence)
            try:
                self._check_tokens(sequence.request)
            except Exception as error:
                self._fail(sequence, error)
        for sequence in self._present():
            if sequence.request.id in cancelled:
                self._end(sequence, "cancelled")

    def _present(self) -> tuple[Sequence, ...]:
        return (*self._streams.waiting, *self._streams.running)

    def _tell(
        self,
        sequence: Sequence,
        token: int | None,
        reason: FinishReason | None,
        error: str | None = None,
        code: ErrorCode | None = None,
        probabilities: Probabilities | None = None,
    ) -> None:
        request = sequence.request
        index = sequence.generated - (token is not None)
        said = StepTokens(request.id, index, token, reason, request.attempt, error, code, probabilities, sequence.found)
        self._outbox.put(request.ingress, said)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token: int | None = None,
        error: str | None = None,
        code: ErrorCode | None = None,
        probabilities: Probabilities | None = None,
    ) -> None:
        self._tell(sequence, token, reason, error, code, probabilities)
        self._streams.remove(sequence, failed=reason == "error")
        self._suspects.acquit(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End the request with an error; what is not the request's own doing is in the log under its id."""
        if unfit(error):  # whatever of the stream's own met it first
            raise error
        said, code = _told(error)
        if code in (None, "out_of_memory"):
            _LOG.error("request %s failed", sequence.request.id, exc_info=error)
        self._end(sequence, "error", error=said, code=code)

    def _blame(self, error: Exception) -> None:
        """After an exception: try each half of several streams, end the one that was alone, or the thread of a process
        that is unfit."""
        chunks, self._computing = self._computing, ()
        if unfit(error) or not chunks:
            self._failures = _GIVE_UP if unfit(error) else self._failures + 1
            _LOG.error("a step failed by no stream's fault (%d of %d)", self._failures, _GIVE_UP, exc_info=error)
        elif (culprit := self._suspects.after_failure(chunks, error)) is not None:
            self._fail(culprit, error)
        else:
            _LOG.error("a step of %d streams failed; trying each half by itself", len(chunks), exc_info=error)

    def _check_tokens(self, request: GenerationRequest) -> None:
        """Raises UnknownToken for an id that the embedding has no row for, which on a GPU would end the process."""
        rows = len(self._backbone.embedding)
        ids = (*request.prompt_ids, *request.generated)
        wrong = next((at for at, id in enumerate(ids) if not 0 <= id < rows), None)
        if wrong is not None:
            raise UnknownToken(f"token {wrong} of the prompt is {ids[wrong]}; the model has {rows}")

    def _note(self, batch: Batch) -> None:
        """The step's line in the log; that it cannot be written is nobody's failure."""
        self._steps += 1
        try:
            self._log.write(self._line(batch))
        except Exception:
            _LOG.exception("step %d goes unlogged", self._steps)

    def _line(self, batch: Batch) -> dict[str, JSON]:
        residents = {graft: self._streams.residency.get(graft) for graft in batch.grafts}
        return {
            "step": self._steps,
            "time": round(self._now(), 3),
            "rows": len(batch.rows),
            "prefill_rows": sum(chunk.rows for chunk in batch.chunks if chunk.rows > 1),
            "requests": [chunk.sequence.request.id for chunk in batch.chunks],
            "grafts": list(residents),
            "methods": sorted({resident.graft.spec.method for resident in residents.values() if resident}),
            "device": str(self._backbone.device),
        }

    def _run(self) -> None:
        while not self._stopping and self._failures < _GIVE_UP:
            if not self.turn():
                self._idle()
            elif self._step_floor_s:
                time.sleep(max(0.0, self._step_floor_s - (self._clock() - self.beat)))
        self._take_in()
        for sequence in self._present():
            self._end(sequence, "cancelled")
        self.load = self._streams.load
        self._outbox.flush(self.load, self._clock())
        self._log.close()

    def _idle(self) -> None:
        if not self._streams.running:
            self._streams.blocks.check()
        with self._changed:
            if not self._awake:
                self._changed.wait(_IDLE_S)
            self._awake = False

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()


def _told(error: Exception) -> tuple[str, ErrorCode | None]:
    """What a client is told of a failure, and what it can do about it."""
    match error:
        case ContextExceeded():
            return f"{error}", "context_length_exceeded"
        case UnknownToken():
            return f"{error}", "unknown_token"
        case WrongUse():
            return f"{error}", "wrong_model"
        case GraftUnusable() | NotFinite():
            return f"{error}", None
        case _ if allocation_failed(error):
            return "the replica has not enough memory for it now", "out_of_memory"
        case _:
            return type(error).__name__, None

"""The streams of a replica: who waits and who runs, and the cache blocks and grafts that they hold."""

from __future__ import annotations

from bisect import insort

from polygraft.cluster.model import GraftId
from polygraft.cluster.policy.batching import Running, Waiting, admit_streams
from polygraft.cluster.policy.entry import blocks_for, ever_fits
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache
from polygraft.serving.batch import Chunk
from polygraft.serving.blocks import BLOCK_SIZE, Blocks
from polygraft.serving.loading import Loader
from polygraft.serving.messages import Load
from polygraft.serving.residency import Residency
from polygraft.serving.sequence import Sequence


class ContextExceeded(Exception):
    """A request that is longer than the context together with its graft's virtual tokens."""


class Streams:
    """Both lists are oldest first; a running stream holds blocks and pins its graft. The engine's thread owns it."""

    def __init__(self, backbone: Backbone, settings: ServeSettings, residency: Residency, loader: Loader) -> None:
        """Raises ValueError when the key-value cache is smaller than one context."""
        per_block = KVCache.bytes_per_block(backbone.shape, BLOCK_SIZE, backbone.dtype)
        count = settings.kv_bytes // per_block
        if not ever_fits(settings.max_context, blocks=count - 1, block_size=BLOCK_SIZE):
            raise ValueError(
                f"serve.kv_bytes: {settings.kv_bytes} is less than one context of {settings.max_context} tokens needs; "
                f"give at least {(blocks_for(settings.max_context, BLOCK_SIZE) + 2) * per_block}"
            )
        dtype, device = backbone.dtype, backbone.device
        self.cache = KVCache(backbone.shape, count, block_size=BLOCK_SIZE, dtype=dtype, device=device)
        self.blocks = Blocks(count=count, block_size=BLOCK_SIZE, bytes_per_block=per_block)
        self.residency = residency
        self._settings = settings
        self._loader = loader
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._held_up: Sequence | None = None  # the oldest whose graft is read and does not fit

    @property
    def load(self) -> Load:
        blocks = self.blocks
        return Load(len(self.running), len(self.waiting), blocks.total, blocks.free_blocks, self.residency.held)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """Forget it, wherever it is, and take back what it holds."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self._release(sequence)

    def load_grafts(self) -> list[tuple[Sequence, Exception]]:
        """Bring in the grafts that waiting streams need, oldest first; returns who can never have theirs, and why."""
        self._held_up = None
        failed: list[tuple[Sequence, Exception]] = []
        wanted: set[GraftId] = set()
        for sequence in self.waiting:
            graft = sequence.request.graft
            try:
                if graft is not None and self.residency.get(graft) is None:
                    resident = self._loader.ask(graft)
                    if resident is not None:
                        if self.residency.can_admit(resident, wanted):
                            self.residency.admit(resident, wanted)
                        else:
                            self._held_up = self._held_up or sequence
                self._check_length(sequence)
            except Exception as error:  # whatever is wrong with one graft concerns only those who want it
                failed.append((sequence, error))
                continue
            if graft is not None:
                wanted.add(graft)
        self._loader.keep([graft for graft in wanted if self.residency.get(graft) is None])
        return failed

    def choose(self) -> list[Chunk]:
        """What the policy wants computed next, its evictions and admissions done, blocks for every row at hand."""
        ready = [s for s in self.waiting if s.request.graft is None or self._may_pin(s, s.request.graft)]
        for sequence in ready:
            if (graft := self._graft(sequence)) is not None:
                sequence.attach_graft(graft)
        plan = admit_streams(
            [Waiting(s.request.id, s.left, s.prefix + len(s.tokens), s.min_chunk) for s in ready],
            [self._as_running(sequence) for sequence in self.running],
            free_blocks=self.blocks.free_blocks,
            block_size=BLOCK_SIZE,
            max_streams=self._settings.max_streams,
            rows=self._settings.max_rows,
        )
        found = {sequence.request.id: sequence for sequence in (*ready, *self.running)}
        for id in plan.evicted:
            self._preempt(found[id])
        for id in plan.admitted:
            self._admit(found[id])
        chunks = [Chunk(found[id], rows) for id, rows in plan.chunks]
        for chunk in chunks:
            self._grow(chunk.sequence, chunk.sequence.cached + chunk.rows)
        return chunks

    def _may_pin(self, sequence: Sequence, graft: GraftId) -> bool:
        """Whether its graft is in memory and nobody older waits for the room that such grafts take: younger streams
        that kept them in use, one after the other, would keep it out for ever."""
        held_up = self._held_up is not None and _age(self._held_up) < _age(sequence)
        return self.residency.get(graft) is not None and not held_up

    def _as_running(self, sequence: Sequence) -> Running:
        id = sequence.request.id
        held, missing = len(self.blocks.table(id)), self.blocks.missing(id, sequence.cached + 1)
        return Running(id, sequence.left, held, missing, sequence.min_chunk)

    def _admit(self, sequence: Sequence) -> None:
        """Blocks for all its tokens, its graft's prefix in the first of them."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_age)
        self._grow(sequence, sequence.prefix + len(sequence.tokens))
        graft = sequence.request.graft
        if graft is not None:
            self.residency.pin(graft)
            resident = self.residency.get(graft)
            assert resident is not None
            self.cache.write_prefix(self.blocks.table(sequence.request.id), resident)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its original arrival; what it has said is kept and computed again as context."""
        self._release(sequence)
        sequence.computed = 0
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence.request.id)
        if sequence.request.graft is not None:
            self.residency.unpin(sequence.request.graft)

    def _grow(self, sequence: Sequence, slots: int) -> None:
        id = sequence.request.id
        self.cache.clear(self.blocks.allocate(id, self.blocks.missing(id, slots)))

    def _graft(self, sequence: Sequence) -> BoundGraft | None:
        """Its graft, once that is in memory."""
        resident = self.residency.get(sequence.request.graft) if sequence.request.graft else None
        return resident.graft if resident else None

    def _check_length(self, sequence: Sequence) -> None:
        request = sequence.request
        graft = self._graft(sequence)
        need = (graft.context_length if graft else 0) + len(request.prompt_ids) + request.max_tokens
        if need > self._settings.max_context:
            raise ContextExceeded(
                f"prompt, answer and virtual tokens are {need}, the context is {self._settings.max_context}"
            )


def _age(sequence: Sequence) -> tuple[float, str]:
    return sequence.arrival, sequence.request.id

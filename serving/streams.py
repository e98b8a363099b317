"""The streams of a replica: who waits and who runs, and the cache blocks and grafts that they hold."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from polygraft.cluster.model import GraftId
from polygraft.cluster.policy.batching import Running, StepPlan, Waiting, admit_streams
from polygraft.cluster.policy.entry import blocks_for, ever_fits
from polygraft.cluster.policy.fairness import in_turn
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache
from polygraft.serving.batch import Chunk
from polygraft.serving.blocks import BLOCK_SIZE, Blocks
from polygraft.serving.loading import Loader
from polygraft.serving.messages import Load, Tally
from polygraft.serving.prefixes import NOTHING, Match
from polygraft.serving.residency import Residency
from polygraft.serving.sequence import Sequence
from polygraft.serving.tenants import Tenants

Failed = tuple[Sequence, Exception]


class ContextExceeded(Exception):
    """A request that is longer than the context together with its graft's virtual tokens."""


class WrongUse(Exception):
    """A request to write with a graft that classifies, or to classify with one that writes."""


class Streams:
    """`waiting` is oldest first, behind those that another replica had, `running` first admitted first; a running
    stream holds blocks and pins its graft. The engine's thread owns it."""

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
        self.expected: dict[GraftId, None] = {}  # by streams of another replica that are to come
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.tenants = Tenants(settings)
        self._ready: list[Sequence] = []  # of `waiting`, in turn: whose graft is in memory
        self._deferred = 0  # of `waiting`: whose graft is not
        self._tally = Tally()

    @property
    def load(self) -> Load:
        blocks, residency, loader = self.blocks, self.residency, self._loader
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks=blocks.total,
            free_blocks=blocks.free_blocks,
            resident=residency.held,
            resident_bytes=residency.used_bytes,
            deferred=min(self._deferred, len(self.waiting)),
            tally=replace(self._tally, loads=loader.loads, load_s=loader.load_s, evictions=residency.evictions),
        )

    def stepped(self, rows: int, seconds: float) -> None:
        """A step of so many rows is over."""
        done = self._tally
        self._tally = replace(done, steps=done.steps + 1, rows=done.rows + rows, step_s=done.step_s + seconds)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_age)
        self.tenants.queued(sequence)

    def remove(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Forget it, wherever it is, and take back what it holds; nobody goes on from what one that failed had."""
        if sequence in self.waiting:
            self._unqueue(sequence)
        if sequence in self.running:
            if failed:
                self.blocks.distrust(sequence.request.id)
            else:
                self._know(sequence)
            self._release(sequence)

    def load_grafts(self, now: float) -> list[Failed]:
        """Bring in the grafts that waiting streams need, in turn; returns who can never have theirs, and why."""
        self.tenants.mark_overdue(self.waiting, now)
        order = list(in_turn(self.waiting, self.tenants.ledger, Counter(one.tenant for one in self.running)))
        missing = dict.fromkeys(one.request.graft for one in order if one.request.graft and not self._graft(one))
        self._loader.keep([*missing, *(self.expected.keys() - missing)])
        self._ready = []
        held_up = False
        wanted: set[GraftId] = set()
        failed: list[Failed] = []
        for sequence in order:
            graft = sequence.request.graft
            try:
                held_up = not self._make_room(graft, wanted) or held_up
                self._check_use(sequence)
                self._check_length(sequence)
            except Exception as error:  # whatever is wrong with one graft concerns only those who want it
                failed.append((sequence, error))
                continue
            if graft is not None:
                wanted.add(graft)
            # Where a graft waits for room, streams whose turn is later do not start: they would keep theirs in use,
            # one after the other, and that one out for ever.
            if graft is None or (self._graft(sequence) is not None and not held_up):
                self._ready.append(sequence)
        self._deferred = len(order) - len(self._ready) - len(failed)
        self._load_expected(wanted)
        return failed

    def choose(self, now: float) -> tuple[list[Chunk], list[Failed]]:
        """What the policy wants computed next, its evictions and admissions done, blocks for every row at hand; and
        who could not be given what it needs, and why."""
        failed: list[Failed] = []
        _each(self.running, self._know, failed)
        ready = _each(self._ready, self._attach, failed)
        plan = self._plan(ready, failed)
        found = {sequence.request.id: sequence for sequence in (*ready, *self.running)}
        for id in plan.evicted:
            self._preempt(found[id])
        # All take what is computed already before blocks are given out, which are theirs otherwise.
        admitted = _each((found[id] for id in plan.admitted), lambda one: self._admit(one, now), failed)
        _each(admitted, self._fill, failed)
        # More may be found of one than when it was planned: some blocks that were looked at are given out since.
        rows = {id: min(count, found[id].left) for id, count in plan.chunks}
        lost = {sequence for sequence, _ in failed}
        chosen = [found[id] for id in rows if found[id] not in lost]
        grown = _each(chosen, lambda one: self._grow(one, one.cached + rows[one.request.id]), failed)
        return [Chunk(sequence, rows[sequence.request.id]) for sequence in grown], failed

    def _make_room(self, graft: GraftId | None, wanted: set[GraftId]) -> bool:
        """Take its graft in once it is read; False when it is read and does not fit beside those in use or `wanted`
        by streams whose turn is earlier."""
        if graft is None or self.residency.get(graft) is not None or (resident := self._loader.ask(graft)) is None:
            return True
        if not self.residency.can_admit(resident, wanted):
            return False
        self.residency.admit(resident, wanted)
        return True

    def _load_expected(self, wanted: set[GraftId]) -> None:
        """Bring in what is expected, where there is room beside what is wanted now; whoever comes for one that cannot
        be read is told why then."""
        for graft in list(self.expected):
            try:
                reading = self.residency.get(graft) is None and self._loader.ask(graft) is None
                if not reading:
                    self._make_room(graft, wanted)
            except Exception:
                reading = False
            if not reading:
                del self.expected[graft]

    def _attach(self, sequence: Sequence) -> None:
        if (graft := self._graft(sequence)) is not None:
            sequence.attach_graft(graft)

    def _plan(self, ready: list[Sequence], failed: list[Failed]) -> StepPlan:
        """What the policy wants. Where it raises, those end whom it raises over alone; it is a pure function."""
        try:
            return self._asked(ready[: self._settings.max_streams], self.running)
        except Exception:
            before = len(failed)
            _each((*ready, *self.running), self._asked_alone, failed)
            if len(failed) == before:
                raise
            return StepPlan((), (), ())

    def _asked_alone(self, sequence: Sequence) -> StepPlan:
        return self._asked([], [sequence]) if sequence in self.running else self._asked([sequence], [])

    def _asked(self, ready: list[Sequence], running: list[Sequence]) -> StepPlan:
        held = self.blocks.yields(sequence.request.id for sequence in running)
        return admit_streams(
            [self._as_waiting(sequence) for sequence in ready],
            [self._as_running(*each) for each in zip(running, held, strict=True)],
            ledger=self.tenants.ledger,
            free_blocks=self.blocks.free_blocks,
            block_size=BLOCK_SIZE,
            max_streams=self._settings.max_streams,
            rows=self._settings.max_rows,
        )

    def _as_waiting(self, one: Sequence) -> Waiting:
        slots = one.prefix + len(one.tokens)
        left = slots - max(one.prefix, self._match(one).slots)
        return Waiting(one.request.id, left, slots, one.min_chunk, one.tenant, one.cost, one.overdue)

    def _as_running(self, one: Sequence, held: int) -> Running:
        missing = self.blocks.missing(one.request.id, one.cached + 1)
        return Running(one.request.id, one.left, held, missing, one.min_chunk, one.tenant)

    def _match(self, sequence: Sequence) -> Match:
        """What is computed of it: never all, since its newest token's logits are asked for."""
        if self._shares(sequence) and not sequence.match.holds:
            sequence.match = self.blocks.match(sequence.owner, sequence.ids[:-1], sequence.match)
        return sequence.match

    def _shares(self, sequence: Sequence) -> bool:
        return self._settings.prefix_cache and sequence.cacheable

    def _know(self, sequence: Sequence) -> None:
        """Let others find its full blocks, once a token was drawn behind them: it was finite, and so are they."""
        id, full = sequence.request.id, sequence.cached // BLOCK_SIZE
        if self._shares(sequence) and sequence.left <= 1 and full > self.blocks.known(id):
            self.blocks.know(id, sequence.owner, sequence.ids[: full * BLOCK_SIZE])

    def _admit(self, sequence: Sequence, now: float) -> None:
        """It runs, with the full blocks of what is computed of it."""
        graft = sequence.request.graft
        self._unqueue(sequence)
        if sequence.entered is None:
            done = self._tally
            queued = done.queued_s + now - sequence.arrival
            self._tally = replace(done, entered=done.entered + 1, queued_s=queued)
        known = self._match(sequence).blocks
        self.tenants.entered(sequence, now)
        insort(self.running, sequence, key=_turn)
        if graft is not None:
            self.residency.pin(graft)
        self.blocks.share(sequence.request.id, known)

    def _fill(self, sequence: Sequence) -> None:
        """Blocks for all its tokens; what is computed of it, and of its graft's prefix what is not there."""
        self._grow(sequence, sequence.prefix + len(sequence.tokens))
        table, match = self.blocks.table(sequence.request.id), self._match(sequence)
        if match.copied:
            self.cache.copy(match.source, table[len(match.blocks)], match.copied)
        if sequence.request.graft is not None:
            resident = self.residency.get(sequence.request.graft)
            assert resident is not None
            self.cache.write_prefix(table, resident, match.slots)
        sequence.computed = max(0, match.slots - sequence.prefix)
        if self._shares(sequence):
            queries, hits = self._tally.prefix_queries + len(sequence.tokens), self._tally.prefix_hits
            self._tally = replace(self._tally, prefix_queries=queries, prefix_hits=hits + sequence.computed)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its original arrival; what it has said is kept and computed again as context."""
        self._release(sequence)
        self._tally = replace(self._tally, preemptions=self._tally.preemptions + 1)
        sequence.computed, sequence.match = 0, NOTHING
        self.add(sequence)

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.tenants.unqueued(sequence)

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

    def _check_use(self, sequence: Sequence) -> None:
        graft = self._graft(sequence)
        if graft is not None and bool(graft.head) != sequence.request.classifies:
            does = "it classifies texts and writes none" if graft.head else "it has no classifier"
            raise WrongUse(f"graft {sequence.request.graft} cannot be used so: {does}")

    def _check_length(self, sequence: Sequence) -> None:
        request = sequence.request
        graft = self._graft(sequence)
        need = (graft.context_length if graft else 0) + len(request.prompt_ids) + request.max_tokens
        if need > self._settings.max_context:
            raise ContextExceeded(
                f"prompt, answer and virtual tokens are {need}, the context is {self._settings.max_context}"
            )


def _each(sequences: Iterable[Sequence], act: Callable[[Sequence], object], failed: list[Failed]) -> list[Sequence]:
    """Do it for each; returns those for whom it was done, the others go to `failed`."""
    done = []
    for sequence in sequences:
        try:
            act(sequence)
        except Exception as error:
            failed.append((sequence, error))
        else:
            done.append(sequence)
    return done


def _age(sequence: Sequence) -> tuple[bool, float, str]:
    return not sequence.request.resumed, sequence.arrival, sequence.request.id


def _turn(sequence: Sequence) -> int:
    assert sequence.entered is not None
    return sequence.entered

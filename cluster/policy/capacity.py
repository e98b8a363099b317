"""How large everything may be that a pack or a replica makes, from the bytes that it holds of a device, how fast that
computes, and the shape of the model. Sizes are estimates from shapes alone, on the safe side."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.cluster.model import DeviceKind
from polygraft.cluster.policy.budget import STATE_BYTES
from polygraft.cluster.policy.entry import blocks_for
from polygraft.grafts.sites import LINEAR, ModelShape, Site

GIVEN = 0.96  # of the bytes held; the rest is for what no estimate knows
BLOCK = 16  # tokens of a block of the key-value cache
NF4_BYTES = 0.5 + 1.02 / 64  # a weight: its code, and the scales of 64 (QLoRA, arXiv 2305.14314)
PROCESS_BYTES = 512 << 20  # torch, Ray and the tokenizer in a process that computes
_UNLIMITED = 32768  # positions of a model that has no last one
_LEAST_CONTEXT = 256
_STREAM_TOKENS = 1024  # that a stream holds of the cache, in the mean
_MOST_STREAMS = {"cpu": 256, "cuda": 1024}
_MOST_ROWS = {"cpu": 2048, "cuda": 8192}
_MOST_PACK_ROWS = {"cpu": 4096, "cuda": 16384}
_LEAST_ROWS = 16
_SERVE_STEP_S = 0.25  # a step of a replica may take so long where all its rows are prompt
_PACK_STEP_S = 1.5  # and one of a pack, forward and backward
_MICRO_ROWS = {"cpu": 128, "cuda": 1024}  # of a job's micro-batch: what a device computes well alone
_MOST_JOBS = 256
_RANK = 16  # of the LoRA at all projections that a job is taken for where nobody knows it yet
_SLACK = 1.25  # over what a row's numbers are (grafts/cost.py)


class DoesNotFit(ValueError):
    """A backbone that a device has no room for; the message has the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A backbone as it is loaded: numbers of `itemsize` bytes, its projections in four bits where it is `quantised`."""

    shape: ModelShape
    itemsize: int
    quantised: bool = False

    @property
    def projections(self) -> int:
        """Weights of the layers' projections."""
        return sum(self._linear(name) for name in LINEAR)

    @property
    def flops(self) -> int:
        """Of a row's forward, attention aside."""
        return 2 * (self.projections + self.shape.vocab * self.shape.hidden)

    def weight_bytes(self, *, copies: int = 1) -> int:
        """In memory: the head lies apart from the embedding, and `copies` of the projections where they are multiplied
        with in both directions in layouts of their own."""
        ends = 2 * self.shape.vocab * self.shape.hidden * self.itemsize
        each = NF4_BYTES if self.quantised else self.itemsize * copies
        return ends + int(self.projections * each)

    @property
    def widest_bytes(self) -> int:
        """Of the dense form of the largest fused projection, which exists while it is multiplied with; 0 where weights
        lie dense."""
        shape = self.shape
        fused = max(shape.heads * shape.head_dim + 2 * shape.kv_width, 2 * shape.ffn) * shape.hidden
        return 2 * fused * self.itemsize if self.quantised else 0

    @property
    def token_bytes(self) -> int:
        """Of a token in the key-value cache."""
        return self.shape.layers * 2 * self.shape.kv_width * self.itemsize

    @property
    def passing_bytes(self) -> int:
        """Of a row in a forward without a backward, in float32."""
        shape = self.shape
        return 4 * (6 * shape.hidden + 4 * shape.heads * shape.head_dim + 4 * shape.kv_width + 4 * shape.ffn)

    @property
    def kept_bytes(self) -> int:
        """Of a row between its forward and its backward (`grafts/cost.py`)."""
        shape = self.shape
        queries = shape.heads * shape.head_dim
        layer = self.itemsize * (3 * shape.hidden + 2 * queries + 4 * shape.kv_width + 2 * shape.ffn)
        return int(_SLACK * shape.layers * layer)

    @property
    def job_bytes(self) -> int:
        """State of a job that trains LoRA at all projections."""
        ranks = sum(sum(self.shape.dims(name)) * self._count(name) for name in LINEAR)
        return STATE_BYTES * _RANK * ranks

    def _linear(self, name: str) -> int:
        d_in, d_out = self.shape.dims(name)
        return d_in * d_out * self._count(name)

    def _count(self, name: str) -> int:
        return sum(self.shape.has(Site(layer, name)) for layer in range(self.shape.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What a process has of a device: bytes, and the speed of a product there (0: nobody has measured it)."""

    kind: DeviceKind
    bytes: int
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCapacity:
    """Of a replica. `given_out` are the bytes that its weights, these sizes and its steps take together."""

    kv_bytes: int
    graft_bytes: int
    max_streams: int
    max_rows: int
    max_context: int
    given_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackCapacity:
    """Of a pack. `memory_bytes` are for the jobs' state and one forward."""

    memory_bytes: int
    max_rows: int
    micro_rows: int
    max_jobs: int
    given_out: int


def serve_capacity(model: ModelSize, held: Portion) -> ServeCapacity:
    """Grafts get a thirty-second, their stacks as much again; a step as many rows as it computes in a quarter of a
    second, and may take a sixteenth; the key-value cache gets the rest. Raises DoesNotFit."""
    shape, room = model.shape, int(held.bytes * GIVEN)
    fixed = model.weight_bytes() + PROCESS_BYTES + (model.widest_bytes if held.kind == "cpu" else 0)
    grafts = held.bytes // 32
    left = room - fixed - 2 * grafts
    positions = shape.positions or _UNLIMITED
    gathered = 1 + 2 / shape.layers if held.kind == "cpu" else 1.0  # a layer's contexts, gathered for its products
    token = int(model.token_bytes * gathered)
    least = min(positions, _LEAST_CONTEXT) * token + model.passing_bytes * _LEAST_ROWS
    if left < least:
        raise DoesNotFit(
            f"a replica needs at least {fixed + 2 * grafts + least:,} bytes, {model.weight_bytes():,} of them for the "
            f"weights, and {room:,} of a device can be given to it"
        )
    context = min(positions, left // token)
    scores = shape.heads * context * 8 if held.kind == "cpu" else 0  # of a row
    rows = _within(_by_speed(held, model.flops, _SERVE_STEP_S), held)
    while rows > _LEAST_ROWS and rows * (model.passing_bytes + scores) > max(held.bytes // 16, least):
        rows //= 2
    logits = 12 * shape.vocab  # float32, sorted and as probabilities
    streams = min(_MOST_STREAMS[held.kind], rows // 2, _power(left // token // _STREAM_TOKENS))
    step = rows * (model.passing_bytes + scores) + streams * logits
    cache = min(max(left - step, least), streams * positions * token)
    block = model.token_bytes * BLOCK
    kv = int(cache / gathered) // block * block
    return ServeCapacity(
        kv_bytes=kv,
        graft_bytes=grafts,
        max_streams=streams,
        max_rows=rows,
        max_context=longest_context(model, kv),
        given_out=fixed + 2 * grafts + step + cache,
    )


def longest_context(model: ModelSize, kv_bytes: int) -> int:
    """Tokens of the longest stream that a key-value cache of so many bytes holds, or that the model has positions for:
    of its blocks, one is never given out, and a stream keeps one to grow into."""
    held = (kv_bytes // (model.token_bytes * BLOCK) - 2) * BLOCK
    return max(BLOCK, min(model.shape.positions or _UNLIMITED, held))


def pack_capacity(model: ModelSize, held: Portion) -> PackCapacity:
    """Half of what the weights leave is for a forward, half for the jobs' state; a forward has as many rows as it
    computes in a second and a half with its backward. Raises DoesNotFit."""
    room = int(held.bytes * GIVEN)
    copies = 2 if held.kind == "cpu" and model.itemsize == 4 else 1
    fixed = model.weight_bytes(copies=copies) + PROCESS_BYTES + model.widest_bytes
    left, least = room - fixed, 2 * _LEAST_ROWS * model.kept_bytes
    if left < least:
        raise DoesNotFit(
            f"a pack needs at least {fixed + least:,} bytes, {model.weight_bytes(copies=copies):,} of them for the "
            f"weights, and {room:,} of a device can be given to it"
        )
    most = left // 2 // model.kept_bytes
    micro = _MICRO_ROWS[held.kind]
    while micro > most:  # which is _LEAST_ROWS at least
        micro //= 2
    fast = _by_speed(held, 2 * model.flops, _PACK_STEP_S) // 256 * 256
    rows = max(micro, min(fast, most, _MOST_PACK_ROWS[held.kind]) // 8 * 8)
    return PackCapacity(
        memory_bytes=left,
        max_rows=rows,
        micro_rows=micro,
        max_jobs=max(1, min(_MOST_JOBS, left // 2 // model.job_bytes)),
        given_out=fixed + left,
    )


def streams_at_once(capacity: ServeCapacity, model: ModelSize, tokens: int) -> int:
    """How many streams of so many tokens run together, each with a block to grow into."""
    free = capacity.kv_bytes // (model.token_bytes * BLOCK) - 1
    return min(capacity.max_streams, free // (blocks_for(tokens, BLOCK) + 1))


def _by_speed(held: Portion, flops: int, seconds: float) -> int:
    """Rows that are computed in so many seconds; where the speed is not known, as many as a slow CPU takes."""
    return int((held.speed or 1e11) * seconds / flops)


def _within(rows: int, held: Portion) -> int:
    return max(_LEAST_ROWS, min(_power(rows), _MOST_ROWS[held.kind]))


def _power(number: int) -> int:
    """The largest power of two that is no more; 1 below it."""
    return 1 << max(0, number.bit_length() - 1)

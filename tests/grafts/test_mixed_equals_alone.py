"""A sequence decoded through the cache beside every other method gets the logits and tokens of its graft alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention, PagedSequence
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.kernels.dense import op as dense
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.oracle.table import METHODS

BLOCK = 8
LENGTHS = (9, 33, 17, 1, 26, 35, 12, 7, 21)  # of the eight grafts' prompts, and of the bare backbone's
CHUNK, TAIL = 6, 4  # a prompt is taken in chunks, its last tokens one by one as in decoding
BARE = "bare"
NAMES = (*METHODS, BARE)


@dataclass
class Stream:
    """A sequence in the cache: `ids` are known (teacher-forced or produced), `done` of them have been computed."""

    graft: int | None
    ids: list[int]
    table: tuple[int, ...]
    prefix: int
    done: int = 0
    logits: list[Tensor] = field(default_factory=list)


@dataclass
class Decoder:
    """A pool whose blocks hold NaN until they are given out, and the streams that share every forward."""

    backbone: Backbone
    stacks: Stacks
    cache: KVCache
    free: list[int]

    @staticmethod
    def of(backbone: Backbone, residents: Sequence[Resident], blocks: int = 80) -> Decoder:
        cache = KVCache(backbone.shape, blocks, block_size=BLOCK, dtype=backbone.dtype)
        cache.data[:, 1:] = torch.nan
        return Decoder(backbone, backbone.stacks(residents), cache, list(range(1, blocks)))

    def open(self, graft: int | None, ids: Sequence[int], room: int = 0) -> Stream:
        resident = None if graft is None else self.stacks.residents[graft]
        prefix = resident.spec.prefix_length if resident else 0
        count = (prefix + len(ids) + room) // BLOCK + 1
        table = tuple(self.free.pop(0) for _ in range(count))
        self.cache.clear(table)
        if resident and prefix:
            self.cache.write_prefix(table, resident)
        return Stream(graft, list(ids), table, prefix)

    def close(self, stream: Stream) -> None:
        """Free the blocks, leaving there what would spoil whoever reads it, and give them out first."""
        self.cache.data[:, list(stream.table)] = torch.nan
        self.free[:0] = stream.table

    def step(self, streams: Sequence[Stream], chunk: Callable[[Stream], int]) -> None:
        """One forward over the next `chunk(stream)` known tokens of every stream that has any."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        work: list[tuple[Stream, PagedSequence]] = []
        for stream in streams:
            count = min(chunk(stream), len(stream.ids) - stream.done)
            if count:
                before = stream.prefix + stream.done
                work.append((stream, PagedSequence(len(ids), count, before, stream.table, stream.prefix)))
                if stream.graft is not None:
                    spans.append(Span(len(ids), len(ids) + count, stream.graft))
                ids += stream.ids[stream.done : stream.done + count]
                positions += range(before, before + count)
        rows = Rows(torch.tensor(ids), torch.tensor(positions), tuple(spans))
        with torch.inference_mode():
            attention = PagedAttention(self.cache, [sequence for _, sequence in work])
            logits = self.backbone.logits(self.backbone.forward(rows, self.stacks, attention))
        for stream, sequence in work:
            stream.logits.append(logits[sequence.start : sequence.start + sequence.rows])
            stream.done += sequence.rows


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.fixture(scope="module", params=["the machine's products", "torch's products"])
def bf16(request: pytest.FixtureRequest, tiny_folder: Path) -> Backbone:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch's products":
            patch.setattr(dense, "library", lambda: None)
        return Backbone.load(tiny_folder, torch.bfloat16)


@pytest.fixture(scope="module")
def values(fp32: Backbone) -> Mapping[str, Mapping[str, Tensor]]:
    return {name: random_tensors(row.graft(fp32.shape), seed=i) for i, (name, row) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def prompts(fp32: Backbone) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, fp32.shape.vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(fp32: Backbone, values: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Logits [T, vocab] of token ids [T] by the independent float32 models."""
    return solo(fp32, values, torch.float32)


def solo(
    backbone: Backbone, values: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> Mapping[str, Callable[[Tensor], Tensor]]:
    bare = plain_model(backbone.folder, dtype)
    models = {name: row.oracle(backbone.folder, values[name], dtype).logits for name, row in METHODS.items()}
    return {**models, BARE: lambda ids: bare(ids[None]).logits[0]}


def residents(backbone: Backbone, values: Mapping[str, Mapping[str, Tensor]]) -> list[Resident]:
    return [Resident(name, row.graft(backbone.shape), values[name]) for name, row in METHODS.items()]


def teacher_forced(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Logits of all prompts, computed in one batch: chunks of some beside single rows of others, joining by and by."""
    streams = [
        decoder.open(None if name == BARE else i, ids) for i, (name, ids) in enumerate(zip(NAMES, prompts, strict=True))
    ]
    turn = 0
    while any(stream.done < len(stream.ids) for stream in streams):
        turn += 1
        decoder.step(streams[: 4 * turn], lambda s: 1 if len(s.ids) - s.done <= TAIL else CHUNK)
    return {name: torch.cat(stream.logits) for name, stream in zip(NAMES, streams, strict=True)}


def test_teacher_forced_logits_are_those_of_the_graft_alone(
    fp32: Backbone,
    values: Mapping[str, Mapping[str, Tensor]],
    prompts: list[list[int]],
    alone: Mapping[str, Callable[[Tensor], Tensor]],
) -> None:
    mixed = teacher_forced(Decoder.of(fp32, residents(fp32, values)), prompts)
    errors = {
        name: relative(mixed[name], alone[name](torch.tensor(ids))) for name, ids in zip(NAMES, prompts, strict=True)
    }
    assert max(errors.values()) < 1e-5, errors


def test_bf16_is_as_near_to_fp32_in_company_as_alone(
    bf16: Backbone,
    values: Mapping[str, Mapping[str, Tensor]],
    prompts: list[list[int]],
    alone: Mapping[str, Callable[[Tensor], Tensor]],
) -> None:
    mixed = teacher_forced(Decoder.of(bf16, residents(bf16, values)), prompts)
    single = solo(bf16, values, torch.bfloat16)
    ratios = {}
    for name, ids in zip(NAMES, prompts, strict=True):
        exact = alone[name](torch.tensor(ids))
        ratios[name] = relative(mixed[name], exact) / relative(single[name](torch.tensor(ids)), exact)
    assert max(ratios.values()) < 1.5, ratios


def test_greedy_tokens_are_those_of_the_graft_alone(
    fp32: Backbone,
    values: Mapping[str, Mapping[str, Tensor]],
    prompts: list[list[int]],
    alone: Mapping[str, Callable[[Tensor], Tensor]],
) -> None:
    decoder, new = Decoder.of(fp32, residents(fp32, values), blocks=100), 8
    streams = [
        decoder.open(None if name == BARE else i, ids, room=new)
        for i, (name, ids) in enumerate(zip(NAMES, prompts, strict=True))
    ]
    while any(len(stream.ids) < len(ids) + new for stream, ids in zip(streams, prompts, strict=True)):
        decoder.step(streams, lambda _: CHUNK)
        for stream, ids in zip(streams, prompts, strict=True):
            if stream.done == len(stream.ids) < len(ids) + new:
                stream.ids.append(int(stream.logits[-1][-1].argmax()))
    for name, stream, ids in zip(NAMES, streams, prompts, strict=True):
        expected = alone[name](torch.tensor(stream.ids[:-1]))[len(ids) - 1 :].detach()
        chosen = expected.gather(1, torch.tensor(stream.ids[len(ids) :])[:, None])[:, 0]
        margin = expected.max(1).values - chosen  # 0 where the token is the same
        assert float(margin.max()) < 1e-4, name  # logits are of size 1 and differ by less than 1e-5


def test_nan_left_in_a_freed_block_reaches_nobody(
    fp32: Backbone, values: Mapping[str, Mapping[str, Tensor]], prompts: list[list[int]]
) -> None:
    decoder = Decoder.of(fp32, residents(fp32, values), blocks=9)  # room for one of the two sequences at a time
    first = decoder.open(0, prompts[5])
    decoder.step([first], lambda _: len(prompts[5]))
    decoder.close(first)
    second = decoder.open(4, prompts[1][:20])
    assert set(second.table) & set(first.table)
    while second.done < 20:
        decoder.step([second], lambda _: 3)

    fresh = Decoder.of(fp32, residents(fp32, values))
    expected = fresh.open(4, prompts[1][:20])
    while expected.done < 20:
        fresh.step([expected], lambda _: 3)
    assert torch.cat(second.logits).isfinite().all()
    assert torch.equal(torch.cat(second.logits), torch.cat(expected.logits))


def test_a_poisoned_neighbour_in_the_batch_reaches_nobody(
    fp32: Backbone, values: Mapping[str, Mapping[str, Tensor]], prompts: list[list[int]]
) -> None:
    """One stream's cached keys and values are NaN: its own logits are, and nobody else's."""
    decoder = Decoder.of(fp32, residents(fp32, values))
    streams = [decoder.open(i, ids) for i, ids in enumerate(prompts[:8])]
    clean = teacher_forced(Decoder.of(fp32, residents(fp32, values)), prompts)
    decoder.step(streams, lambda _: CHUNK)
    decoder.cache.data[:, streams[1].table[0], :1] = torch.nan
    while any(stream.done < len(stream.ids) for stream in streams):
        decoder.step(streams, lambda _: CHUNK)
    assert torch.cat(streams[1].logits).isnan().any()
    for name, stream in zip(NAMES[:8], streams, strict=True):
        if stream is not streams[1]:
            assert relative(torch.cat(stream.logits), clean[name]) < 1e-5

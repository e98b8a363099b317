"""Sizes of packs and replicas against numbers that were worked out by hand, each where another bound decides.

The model has per layer 1,500 weights in q and o, 500 in k and v, 3,000 in the feed-forward; four layers and the head
are 22,500. In float32 a token takes 4 * 2 * 10 * 4 = 320 bytes of the cache, and on a CPU half as much again while it
is gathered; a row takes 1,880 in a forward, on a CPU 6 * 8 more for each token of the context, and 5,100 between
forward and backward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.model import DeviceKind
from polygraft.cluster.policy.capacity import (
    DoesNotFit,
    ModelSize,
    PackCapacity,
    Portion,
    ServeCapacity,
    longest_context,
    pack_capacity,
    serve_capacity,
    streams_at_once,
)
from polygraft.grafts.sites import ModelShape
from tests.cluster.policy.test_capacity import model

SHAPE = ModelShape("llama", layers=4, hidden=25, heads=6, kv_heads=2, head_dim=5, ffn=40, vocab=100, positions=2000)
PLAIN = ModelSize(shape=SHAPE, itemsize=4)
CODED = ModelSize(shape=SHAPE, itemsize=2, quantised=True)
PROCESS = 512 * 1024 * 1024
MILLION = 10**6


def on(kind: DeviceKind, bytes: int, speed: float = 1e8) -> Portion:
    return Portion(kind=kind, bytes=bytes, speed=speed)


def without_last(size: ModelSize) -> ModelSize:
    return replace(size, shape=replace(size.shape, positions=0))


def test_a_model_s_numbers() -> None:
    assert (PLAIN.projections, PLAIN.flops, PLAIN.job_bytes) == (20_000, 45_000, 16 * 16 * 1500)
    assert PLAIN.weight_bytes() == 2 * 2500 * 4 + 80_000 and PLAIN.weight_bytes(copies=2) == 20_000 + 160_000
    assert CODED.weight_bytes() == CODED.weight_bytes(copies=2) == 2 * 2500 * 2 + 10_318  # 20,000 * (1/2 + 1.02/64)
    assert (PLAIN.token_bytes, CODED.token_bytes) == (320, 160)
    assert PLAIN.passing_bytes == CODED.passing_bytes == 4 * (6 * 25 + 4 * 30 + 4 * 10 + 4 * 40)
    assert (PLAIN.kept_bytes, CODED.kept_bytes) == (5100, 2550)
    wide = replace(CODED, shape=replace(SHAPE, heads=18))
    assert (PLAIN.widest_bytes, CODED.widest_bytes, wide.widest_bytes) == (0, 2 * 80 * 25 * 2, 2 * 110 * 25 * 2)


def test_a_replica_whose_steps_leave_the_cache_its_least() -> None:
    """256 tokens of a context and 16 rows: 256 * 480 + 16 * 1,880 = 152,960 bytes."""
    assert serve_capacity(PLAIN, on("cpu", 600 * MILLION)) == ServeCapacity(
        kv_bytes=19 * 5120,
        graft_bytes=18_750_000,
        max_streams=2,  # 1,529,088 bytes are left: 3,185 tokens
        max_rows=256,  # of 555 in a quarter of a second; 512 of 97,880 bytes are more than a sixteenth
        max_context=17 * 16,
        given_out=PROCESS + 100_000 + 37_500_000 + 256 * 97_880 + 2 * 1200 + 152_960,
    )


def test_a_replica_whose_cache_gets_what_the_steps_leave() -> None:
    assert serve_capacity(PLAIN, on("cpu", 620 * MILLION, 4.5e7)) == ServeCapacity(
        kv_bytes=900 * 5120,  # two thirds of 19,479,088 - 128 * 97,880 - 32 * 1,200
        graft_bytes=19_375_000,
        max_streams=32,  # 40,581 tokens are left
        max_rows=128,  # of 250
        max_context=2000,
        given_out=595_200_000,
    )


def test_a_replica_whose_cache_holds_the_longest_contexts_of_all_its_streams() -> None:
    assert serve_capacity(PLAIN, on("cpu", 1000 * MILLION, 4.5e7)) == ServeCapacity(
        kv_bytes=64 * 2000 * 320,
        graft_bytes=31_250_000,
        max_streams=64,  # half of the rows
        max_rows=128,
        max_context=2000,
        given_out=PROCESS + 100_000 + 62_500_000 + 128 * 97_880 + 64 * 1200 + 64 * 2000 * 480,
    )


def test_a_replica_on_a_gpu_gathers_nothing_and_keeps_no_dense_weight() -> None:
    assert serve_capacity(CODED, on("cuda", 620 * MILLION)) == ServeCapacity(
        kv_bytes=7234 * 2560,  # 19,558,770 - 512 * 1,880 - 64 * 1,200 in whole blocks
        graft_bytes=19_375_000,
        max_streams=64,  # 122,242 tokens are left
        max_rows=512,
        max_context=2000,
        given_out=595_200_000,
    )
    dense = [serve_capacity(size, on("cpu", 1000 * MILLION)).given_out for size in (CODED, replace(CODED, itemsize=4))]
    plain = [serve_capacity(replace(PLAIN, itemsize=size), on("cpu", 1000 * MILLION)).given_out for size in (2, 4)]
    weights = 10_000 + 40_000 - 20_318, 20_000 + 80_000 - 30_318
    assert [a - b for a, b in zip(plain, dense, strict=True)] == [weights[0] - 8000, weights[1] - 16_000]


@pytest.mark.parametrize(
    ("kind", "bytes", "rows", "streams"),
    [("cpu", 1000, 2048, 256), ("cuda", 4000, 8192, 1024), ("cuda", 700, 8192, 512)],
)
def test_a_fast_device_takes_no_more_than_is_of_use(kind: DeviceKind, bytes: int, rows: int, streams: int) -> None:
    size = replace(CODED, shape=replace(SHAPE, positions=256))
    found = serve_capacity(size, on(kind, bytes * MILLION, 1e12))
    assert (found.max_rows, found.max_streams, found.max_context) == (rows, streams, 256)


def test_a_step_has_sixteen_rows_at_least_however_long_the_contexts_are() -> None:
    tall = replace(PLAIN, shape=replace(SHAPE, heads=18, positions=0))
    found = serve_capacity(tall, on("cpu", 620 * MILLION))
    assert (found.max_rows, found.max_streams) == (16, 8)
    assert serve_capacity(PLAIN, on("cpu", 620 * MILLION, 1.0)).max_rows == 16
    assert serve_capacity(without_last(PLAIN), on("cpu", 620 * MILLION)).max_rows == 16  # 32,768 tokens of scores


def test_a_step_takes_a_sixteenth_of_the_device_at_most() -> None:
    sixteenth = 512 * (1880 + 2000 * 48)
    assert serve_capacity(PLAIN, on("cpu", 16 * sixteenth)).max_rows == 512
    assert serve_capacity(PLAIN, on("cpu", 16 * sixteenth - 1)).max_rows == 256


@pytest.mark.parametrize(
    ("bytes", "tokens"), [(598_500_000, 380), (599_000_000, 1315), (599_391_600, 2048), (600_000_000, 3185)]
)
def test_a_stream_is_counted_on_to_hold_a_thousand_tokens(bytes: int, tokens: int) -> None:
    left = bytes * 96 // 100 - 2 * (bytes // 32) - PROCESS - 100_000
    assert left // 480 == tokens
    assert serve_capacity(PLAIN, on("cpu", bytes)).max_streams == max(1, tokens // 1024 // 2 * 2)


@pytest.mark.parametrize(("positions", "least"), [(2000, 152_960), (100, 100 * 480 + 30_080), (0, 152_960)])
def test_a_replica_fits_when_its_least_cache_and_step_do(positions: int, least: int) -> None:
    size = replace(PLAIN, shape=replace(SHAPE, positions=positions))
    fixed = PROCESS + 100_000

    def left(bytes: int) -> int:
        return bytes * 96 // 100 - 2 * (bytes // 32) - fixed

    def first(wanted: int) -> int:
        near = (wanted + fixed) * 400 // 359  # a byte more leaves 0.8975 more, and rounding 2 at most
        return next(bytes for bytes in range(near - 32, near + 32) if left(bytes) == wanted)

    enough = first(least)
    assert serve_capacity(size, on("cpu", enough)).kv_bytes > 0
    with pytest.raises(DoesNotFit, match=f"needs at least {fixed + 37_375_000 + least:,} bytes, 100,000 of them for"):
        serve_capacity(size, on("cpu", 598_000_000))
    short = first(least - 1)
    with pytest.raises(DoesNotFit, match=f"weights, and {short * 96 // 100:,} of a device can be given to it"):
        serve_capacity(size, on("cpu", short))
    least_on_a_gpu = min(positions or 256, 256) * 320 + 30_080
    with pytest.raises(DoesNotFit, match=f"needs at least {fixed + 37_375_000 + least_on_a_gpu:,} bytes"):
        serve_capacity(size, on("cuda", 598_000_000))


def test_the_longest_context_leaves_two_blocks_of_the_cache() -> None:
    assert longest_context(PLAIN, 19 * 5120) == longest_context(PLAIN, 20 * 5120 - 1) == 17 * 16
    assert longest_context(PLAIN, 400 * 5120) == 2000
    assert (
        longest_context(without_last(PLAIN), 2050 * 5120) == longest_context(without_last(PLAIN), 3000 * 5120) == 32768
    )
    assert longest_context(PLAIN, 5120) == 16


def test_streams_run_together_while_each_has_a_block_to_grow_into() -> None:
    held = ServeCapacity(kv_bytes=19 * 5120, graft_bytes=1, max_streams=8, max_rows=16, max_context=99, given_out=1)
    assert [streams_at_once(held, PLAIN, tokens) for tokens in (16, 17, 32, 33, 272)] == [8, 6, 6, 4, 1]


def test_a_pack_has_half_of_what_the_weights_leave_for_a_forward_and_half_for_its_jobs() -> None:
    left = 595_200_000 - PROCESS - 180_000  # on a CPU the weights lie there twice
    assert pack_capacity(PLAIN, on("cpu", 620 * MILLION)) == PackCapacity(
        memory_bytes=left, max_rows=1536, micro_rows=128, max_jobs=75, given_out=595_200_000
    )
    assert pack_capacity(PLAIN, on("cuda", 620 * MILLION)).memory_bytes == left + 80_000
    assert pack_capacity(replace(PLAIN, itemsize=2), on("cpu", 620 * MILLION)).memory_bytes == left + 180_000 - 50_000
    assert pack_capacity(CODED, on("cuda", 620 * MILLION, 1e10)) == PackCapacity(
        memory_bytes=595_200_000 - PROCESS - 20_318 - 8000,
        max_rows=11_424,  # of 11,431 whose numbers fit, in eights
        micro_rows=1024,
        max_jobs=75,
        given_out=595_200_000,
    )


@pytest.mark.parametrize(
    ("kind", "bytes", "rows", "jobs"), [("cpu", 2000, 4096, 256), ("cuda", 4000, 16_384, 256), ("cuda", 600, 7664, 50)]
)
def test_a_fast_device_packs_no_more_than_is_of_use(kind: DeviceKind, bytes: int, rows: int, jobs: int) -> None:
    found = pack_capacity(CODED, on(kind, bytes * MILLION, 1e12))
    assert (found.max_rows, found.max_jobs) == (rows, jobs)


@pytest.mark.parametrize(
    ("bytes", "fit", "micro", "rows"),
    [(560_000_000, 53, 32, 48), (560_110_000, 64, 64, 64), (559_598_500, 16, 16, 16), (560_800_000, 129, 128, 128)],
)
def test_a_micro_batch_is_halved_until_its_rows_fit(bytes: int, fit: int, micro: int, rows: int) -> None:
    assert (bytes * 96 // 100 - PROCESS - 180_000) // 2 // 5100 == fit
    found = pack_capacity(PLAIN, on("cpu", bytes))
    assert (found.micro_rows, found.max_rows, found.max_jobs) == (micro, rows, 1)


def test_a_slow_device_s_step_is_a_micro_batch_at_least_and_rows_come_in_256s() -> None:
    rows = [pack_capacity(PLAIN, on("cpu", 620 * MILLION, speed)).max_rows for speed in (1.0, 4e7, 1e8)]
    assert rows == [128, 512, 1536]  # of 0, 666 and 1,666
    assert pack_capacity(PLAIN, on("cuda", 620 * MILLION, 3.075e8)).max_rows == 5120  # of 5,125


def test_a_pack_fits_when_sixteen_rows_do() -> None:
    least = 2 * 16 * 5100
    enough = PROCESS + 180_000 + least
    first = -(-enough * 100 // 96)
    assert pack_capacity(PLAIN, on("cpu", first)).micro_rows == 16
    with pytest.raises(
        DoesNotFit,
        match=f"a pack needs at least {enough:,} bytes, 180,000 of them for the weights, and {enough - 1:,} of a",
    ):
        pack_capacity(PLAIN, on("cpu", first - 1))


def test_a_device_whose_speed_nobody_measured_counts_as_a_slow_one() -> None:
    slow, unknown = (on("cpu", 6 << 30, speed) for speed in (1e11, 0.0))
    assert serve_capacity(model("135M"), unknown) == serve_capacity(model("135M"), slow)
    assert pack_capacity(model("135M"), unknown) == pack_capacity(model("135M"), slow)
    assert serve_capacity(model("135M"), unknown).max_rows == 64

"""What a step is expected to take of memory, against what torch's allocator gave out in one."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.sites import ModelShape
from polygraft.trainers.job import Sample
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_backward
from tests.grafts.oracle.table import ALL
from tests.tiny import TINY, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = ((64,), (16, 16, 16, 16), (400,))
KINDS = ("lora", "ia3", "prefix", "serial", "dora", "prompt", "oft", "loha", "shira")  # one of each op
WITHOUT = [name for name in ALL if not parse(ALL[name].text).sources and name not in KINDS]
METHODS = [*KINDS, *(pytest.param(name, marks=pytest.mark.nightly) for name in WITHOUT)]
GIB = 1 << 30


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_llama(tmp_path_factory.mktemp("wide"), hidden=128, ffn=384)
    return Backbone.load(folder, request.param, training=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_no_more_than_is_expected_and_not_much_less(method: str, backbone: Backbone) -> None:
    graft = BoundGraft(parse(ALL[method].text), backbone.shape)
    start = initialise(graft, backbone, seed=0, samples=[[3, 4, 5]], weights=[[0.0, 1.0, 1.0]])
    stacks = backbone.stacks([Resident("a", graft, start)], trainable=True)
    cost = StepCost(graft, backbone.dtype.itemsize, backbone.score_block)
    for lengths in LENGTHS:
        taken(backbone, stacks, graft, lengths)  # what is made once
        measured, expected = taken(backbone, stacks, graft, lengths), cost.bytes(lengths)
        assert measured <= expected <= 8 * measured, (lengths, measured, expected)


def taken(backbone: Backbone, stacks: Stacks, graft: BoundGraft, lengths: tuple[int, ...]) -> int:
    """Bytes that a step has at most, beyond those before it."""
    samples = tuple(Sample(tuple(range(3, 4 + n)), (0.0,) + (1.0,) * n) for n in lengths)
    micro_batch = MicroBatch(
        0,
        graft.prefix_length,
        samples,
        tuple(range(len(samples))),
        10.0,
        key=3 if graft.draws else None,
        virtual_length=graft.virtual_length,
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(backbone, stacks, [micro_batch])
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_attention_of_a_long_sample_outgrows_everything_else() -> None:
    smollm = ModelShape("llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
    cost = StepCost(BoundGraft(parse("lora(r=16)"), smollm), 2)
    assert cost.bytes([128]) < 0.3 * GIB
    assert cost.bytes([8192]) > 16 * GIB
    assert cost.bytes([256] * 32) < cost.bytes([8192]) / 2


def test_rows_are_halved_until_they_fit() -> None:
    cost = StepCost(BoundGraft(parse("lora(r=4)"), TINY), 4)
    enough = cost.bytes([32] * 4)
    assert cost.rows_within(enough, 128, 32) == 128
    assert cost.rows_within(enough - 1, 128, 32) == 64
    assert cost.rows_within(0, 128, 32) == 1

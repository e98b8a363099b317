"""Examples that begin alike are judged over shared rows, with the bits of rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.shared_rows import shared
from polygraft.grafts.runtime.stacks import Resident
from tests.tiny import TINY
from tests.trainers.test_packed_equals_alone import AWKWARD, METHODS

OTHERS = {"gated prefix": "llama-adapter(3)", "prompt": "prompt(4)", "prefix tuning aside": "unipelt"}
TEXTS = ([5, 6, 7, 8, 9], [5, 6, 7, 8], [5, 6, 7, 3, 9, 11, 12], [4, 6, 7], [5, 6, 7, 8, 9])
DISTINCT = 5 + 4 + 3  # tokens, by what stands before them


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.bfloat16, training=True)


@pytest.fixture(scope="module")
def fp32(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32, training=True)


@pytest.mark.parametrize("text", (METHODS | AWKWARD | OTHERS).values(), ids=METHODS | AWKWARD | OTHERS)
def test_rows_that_follow_the_same_tokens_are_computed_once(bf16: Backbone, text: str, one_thread: None) -> None:
    graft = BoundGraft(parse(text), TINY)
    draw, start = torch.Generator().manual_seed(1), initialise(graft, bf16, seed=0, samples=TEXTS)
    trained = {tensor.name for tensor in graft.trained}
    values = {n: x + 0.1 * torch.randn(x.shape, generator=draw) if n in trained else x for n, x in start.items()}
    stacks, builder = bf16.stacks((Resident("any", graft, values),)), RowBuilder()
    for ids in TEXTS:
        builder.add(ids, graft=0, position=graft.prefix_length, virtual=graft.virtual_length)
    rows, whole = builder.rows(), builder.attention(TINY)
    few, attention, place = shared(rows, whole)
    assert not graft.reads_ahead and len(few) == DISTINCT + graft.virtual_length < len(rows)
    with torch.inference_mode():
        assert torch.equal(bf16.forward(few, stacks, attention)[place], bf16.forward(rows, stacks, whole))


@pytest.mark.parametrize("text", ["unipelt", "unipelt-al", "apt(4)", "parallel(6, act=silu)", "parallel(6, act=gelu)"])
def test_in_float32_too_an_example_has_the_same_bits_alone_beside_others_and_over_shared_rows(
    fp32: Backbone, text: str, one_thread: None
) -> None:
    graft = BoundGraft(parse(text), TINY)
    values = initialise(graft, fp32, seed=0, samples=TEXTS)
    draw = torch.Generator().manual_seed(1)
    values = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in values.items()}
    stacks = fp32.stacks((Resident("any", graft, values),))
    every, alone = RowBuilder(), []
    with torch.inference_mode():
        for ids in (*TEXTS, *([5, 6, 7, *range(8, 8 + more)] for more in (8, 14, 20, 36))):
            for builder in (every, own := RowBuilder()):
                builder.add(ids, graft=0, position=graft.prefix_length, virtual=graft.virtual_length)
            alone.append(fp32.forward(own.rows(), stacks, own.attention(TINY)))
        rows, whole = every.rows(), every.attention(TINY)
        few, attention, place = shared(rows, whole)
        assert torch.equal(fp32.forward(rows, stacks, whole), torch.cat(alone))
        assert torch.equal(fp32.forward(few, stacks, attention)[place], torch.cat(alone))


@pytest.mark.parametrize("text", ["loreft", "smop(length=2)"])
def test_a_graft_whose_rows_depend_on_the_rest_of_the_prompt_reads_ahead(text: str) -> None:
    assert BoundGraft(parse(text), TINY).reads_ahead

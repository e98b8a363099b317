"""Edits at the ends of a prompt: which rows they are, in pieces as in one, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.catalogue import needs_prompt_length
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.cache import KVCache, PagedAttention, PagedSequence
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import Branch, SpecError
from tests.grafts.oracle.row import random_tensors, relative

SIZES = st.integers(0, 9)


@given(length=st.integers(1, 20), first=SIZES, last=SIZES, cuts=st.sets(st.integers(1, 19)), at=SIZES)
def test_pieces_of_a_prompt_have_the_positions_of_the_whole(
    length: int, first: int, last: int, cuts: set[int], at: int
) -> None:
    """{1, ..., first} and {n - last + 1, ..., n}, each once (Wu et al. 2024, section 4); all for neither."""
    bounds = [0, *sorted(cut for cut in cuts if cut < length), length]
    found = [
        row - at + low  # the piece lies from row `at` on
        for low, high in pairwise(bounds)
        for start, stop in Input(at, at + high - low, low, length - high).ends(first, last)
        for row in range(start, stop)
    ]
    ends = {*range(min(first, length)), *range(max(length - last, 0), length)}
    assert found == sorted(ends if first or last else range(length))


@pytest.mark.parametrize("text", ["loreft(r=3, first=2, last=3)", "prompt(3) + direft(r=2, first=0, last=4)"])
def test_a_prompt_in_chunks_is_edited_as_in_one(tiny_folder: Path, text: str) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft = BoundGraft(parse(text), backbone.shape)
    stacks = backbone.stacks((Resident("g", graft, random_tensors(graft, seed=2)),))
    virtual, prompt = graft.virtual_length, 12
    ids = torch.tensor([*virtual_ids(virtual), *range(40, 60)])
    count, table = len(ids), (1, 2)

    def hidden(start: int, stop: int, length: int, attention: WholeSequences | PagedAttention) -> torch.Tensor:
        low, high = max(start, virtual), min(stop, virtual + length)
        inputs = (Input(low - start, high - start, low - virtual, virtual + length - high),) if low < high else ()
        rows = Rows(ids[start:stop], torch.arange(start, stop), (Span(0, stop - start, 0),), inputs=inputs)
        return backbone.forward(rows, stacks, attention)

    cache = KVCache(backbone.shape, 8, dtype=torch.float32)
    cache.clear(range(8))
    with torch.inference_mode():
        whole = hidden(0, count, prompt, WholeSequences(((0, count),), backbone.shape))
        other = hidden(0, count, prompt + 1, WholeSequences(((0, count),), backbone.shape))
        for start, stop in ((0, 4), (4, 9), (9, 13), (13, 14), (14, count - 1), (count - 1, count)):
            piece = PagedAttention(cache, (PagedSequence(0, stop - start, start, table),))
            assert relative(hidden(start, stop, prompt, piece), whole[start:stop]) < 1e-5
    assert relative(other[-1], whole[-1]) > 1e-3, "where the prompt ends matters"


def test_what_makes_no_sense_is_refused() -> None:
    for text, said in (("loreft(first=-1)", r"first, last: \(-1, 7\)"), ("direft(last=-2)", r"\(7, -2\)")):
        with pytest.raises(SpecError, match=said):
            parse(text)
    for arguments in ({"tap": "input"}, {"tap": "output", "gate": "sigmoid"}):
        with pytest.raises(SpecError, match="that a branch of an output has"):
            Branch(at="ffn.out", rank=2, first=1, **arguments)  # type: ignore[arg-type]


def test_an_edit_of_first_tokens_alone_does_not_depend_on_where_the_prompt_ends() -> None:
    assert not needs_prompt_length(parse("loreft(first=3, last=0)"))
    assert needs_prompt_length(parse("lora + noreft")) and not parse("noreft").reads_prompt

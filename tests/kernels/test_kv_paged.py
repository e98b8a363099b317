"""Attention straight over the page table: equal to the reference, and a row's bits its own sequence's alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polygraft.kernels.kv import reference
from polygraft.kernels.kv.layout import Continued
from polygraft.kernels.kv.paged import PagedLayer, Pages, attend_paged
from polygraft.kernels.kv.scores import Scores
from tests.compiled import compiled
from tests.kernels.compare import relative

HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 6, 2, 24, 4, 40
SEQUENCES = (
    Continued(0, 1, 0, (3,)),
    Continued(1, 1, 30, (1, 9, 4, 20, 6, 30, 5, 31), unseen=7),
    Continued(3, 11, 0, (2, 7, 8)),  # row 2 is no sequence's
    Continued(14, 5, 17, (10, 11, 12, 13, 14, 15), unseen=2),
    Continued(19, 1, 63, tuple(range(16, 20)) + tuple(range(21, 30)) + (32, 33, 34)),
)
ROWS = 24
SCORES = (Scores(0.2), Scores(0.2, window=6), Scores(0.3, cap=2.0), Scores(0.25, window=20, cap=1.5))

pytestmark = compiled


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """Queries between other columns, as a fused projection leaves them, and a cache."""
    q = normal(ROWS, HEADS * head_dim + 10, seed=1).to(dtype)[:, : HEADS * head_dim]
    return q, normal(BLOCKS, BLOCK, 2, KV_HEADS * head_dim, seed=2).to(dtype)


def attended(
    q: Tensor, cache: Tensor, scores: Scores, sequences: Sequence[Continued] = SEQUENCES, sums: Tensor | None = None
) -> Tensor:
    pages = Pages()
    pages.hold(sequences, [[s.unseen for s in sequences]])
    return attend_paged(q, cache, pages, PagedLayer(5, HEADS, KV_HEADS, scores), sums)


def truth(q: Tensor, cache: Tensor, scores: Scores) -> Tensor:
    return reference.attend_paged(q.double(), cache.double(), SEQUENCES, HEADS, KV_HEADS, scores)


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 100])
def test_what_is_attended_to_is_the_references(scores: Scores, head_dim: int) -> None:
    q, cache = given(head_dim=head_dim)
    assert relative(attended(q, cache, scores), truth(q, cache, scores)) < 1e-5


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_in_bf16_it_errs_by_little_more_than_the_rounding_of_its_results(scores: Scores) -> None:
    q, cache = given(torch.bfloat16)
    exact = truth(q, cache, scores)
    assert relative(attended(q, cache, scores), exact) < 1.1 * relative(exact.bfloat16(), exact)


def test_each_layer_has_its_own_unseen_positions() -> None:
    q, cache = given()
    pages, hidden = Pages(), [0, 9, 0, 1, 30]
    pages.hold(SEQUENCES, [[s.unseen for s in SEQUENCES], hidden])
    other = [replace(s, unseen=count) for s, count in zip(SEQUENCES, hidden, strict=True)]
    for layer, sequences in enumerate((SEQUENCES, other)):
        got = attend_paged(q, cache, pages, PagedLayer(layer, HEADS, KV_HEADS, SCORES[0]))
        assert torch.equal(got, attended(q, cache, SCORES[0], sequences))


def test_sums_are_the_logs_of_what_the_softmax_divides_by() -> None:
    q, cache = given()
    sums, scores = torch.empty(ROWS, HEADS), SCORES[0]
    attended(q, cache, scores, sums=sums)
    s = SEQUENCES[1]
    keys = torch.unflatten(cache[list(s.blocks)].flatten(0, 1)[s.unseen : s.before + 1, 0].double(), 1, (KV_HEADS, -1))
    own = torch.unflatten(q[s.start].double(), 0, (KV_HEADS, -1, HEAD_DIM))
    wanted = torch.einsum("khd,lkd->khl", own * scores.scaling, keys).logsumexp(-1).flatten()
    assert relative(sums[s.start], wanted) < 1e-6
    assert (sums[2] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_a_sequence_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, scores: Scores) -> None:
    q, cache = given(dtype)
    together = attended(q, cache, scores)
    for s in SEQUENCES:
        rows = slice(s.start, s.start + s.rows)
        assert torch.equal(attended(q[rows], cache, scores, (replace(s, start=0),)), together[rows])


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_a_row_has_the_same_bits_however_its_prompt_is_cut(scores: Scores) -> None:
    q, cache = given(torch.bfloat16)
    whole, s = attended(q, cache, scores), SEQUENCES[2]
    for row in range(s.rows):
        cut = Continued(0, 1, s.before + row, s.blocks, s.unseen)
        assert torch.equal(attended(q[s.start + row :][:1], cache, scores, (cut,))[0], whole[s.start + row])


def test_the_number_of_threads_changes_no_bit() -> None:
    (q, cache), count = given(torch.bfloat16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attended(q, cache, SCORES[0]))
    finally:
        torch.set_num_threads(count)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_of_no_sequence_are_zero() -> None:
    q, cache = given()
    out = attended(q, cache, SCORES[0])
    assert not out[2].any()
    assert not out[20:].any()


def test_what_a_row_does_not_see_may_be_nan() -> None:
    q, cache = given()
    scores = Scores(0.2, window=6)
    clean = attended(q, cache, scores)
    seen = {(s.blocks[p // BLOCK], p % BLOCK) for s in SEQUENCES for row in range(s.rows) for p in _seen(s, row, 6)}
    for block in range(BLOCKS):
        for place in range(BLOCK):
            if (block, place) not in seen:
                cache[block, place] = float("nan")
    assert torch.equal(attended(q, cache, scores), clean)


def _seen(s: Continued, row: int, window: int) -> range:
    position = s.before + row
    return range(max(s.unseen, position - window + 1), position + 1)

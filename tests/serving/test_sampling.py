"""Sampling: a row's token depends on its own logits and its own (seed, choice, index), on nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polygraft.serving.sampling import Draw, sample, uniform


def draw(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, index: int = 0, **left: Any) -> Draw:
    return Draw(temperature, top_p, seed, 0, index, **left)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, [draw(0.0), draw(0.0)]) == [1, 0]


def test_a_row_draws_the_same_token_alone_and_among_neighbours() -> None:
    logits = torch.randn(9, 1000) * 3
    draws = [draw(0.5 + row / 10, 0.6 + row / 20, seed=row, index=3 * row) for row in range(9)]
    together = sample(logits, draws)
    assert [sample(logits[row : row + 1], [draws[row]])[0] for row in range(9)] == together
    assert sample(logits.flip(0), draws[::-1]) == together[::-1]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    n = 4000
    counts = Counter(sample(logits.expand(n, -1), [draw(index=index) for index in range(n)]))
    for token, p in enumerate((0.5, 0.3, 0.2)):  # 4 standard deviations of a binomial share
        assert counts[token] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


@pytest.mark.parametrize("vocabulary", [8, 5000])  # below and above the head that is looked at first
def test_top_p_draws_only_from_the_likeliest_tokens_that_reach_it(vocabulary: int) -> None:
    logits = torch.full((1, vocabulary), -20.0)
    logits[0, [5, 2, 7]] = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    seen = {sample(logits, [draw(top_p=0.7, index=index)])[0] for index in range(300)}
    assert seen == {5, 2}  # 0.6 alone does not reach 0.7
    assert {sample(logits, [draw(top_p=0.0, index=index)])[0] for index in range(50)} == {5}


def test_a_nucleus_wider_than_the_head_is_still_whole() -> None:
    seen = {sample(torch.zeros(1, 3000), [draw(top_p=0.9, index=index)])[0] for index in range(3000)}
    assert len(seen) > 1500  # 512 if only the head were drawn from


def test_a_row_that_is_not_finite_has_no_token_and_harms_nobody() -> None:
    logits = torch.randn(3, 50)
    clean = sample(logits, [draw(seed=1), draw(), draw(0.0)])
    logits[1, 7] = float("nan")
    assert sample(logits, [draw(seed=1), draw(), draw(0.0)]) == [clean[0], None, clean[2]]
    logits[1, 7] = float("inf")
    assert sample(logits, [draw(seed=1), draw(0.0), draw(0.0)]) == [clean[0], None, clean[2]]


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sample(torch.tensor([[1.0, 1.001, -50.0]]), [draw(1e-4)]) == [1]


def test_uniform_numbers_differ_by_seed_choice_and_index_and_fill_the_interval() -> None:
    drawn = [uniform(seed, choice, index) for seed in range(10) for choice in range(2) for index in range(50)]
    assert len(set(drawn)) == len(drawn) and 0.0 <= min(drawn) < 0.01 and 0.99 < max(drawn) < 1.0
    assert uniform(1, 0, 2) == uniform(1, 0, 2)


@pytest.mark.parametrize("vocabulary", [40, 3000])  # below and above the head that is looked at first
@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [
        (1.0, 0.0, 7, 1.0),
        (0.7, 0.3, 0, 1.0),
        (1.3, 0.05, 20, 1.0),
        (1.0, 0.02, 30, 0.6),
        (1.0, 0.0, 1, 0.9),
        (1.0, 1.0, 0, 1.0),
        (2.0, 1e-3, 0, 0.95),
        (1.0, 0.0, 900, 0.99),
        (1.0, 0.0, 10**6, 1.0),
    ],
)
def test_draws_are_those_of_transformers_warpers_in_vllms_order(
    vocabulary: int, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    """The tokens that are left, and the share of each: a draw at every number in turn."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = warpers(None, logits.clone()).softmax(-1)[0]  # type: ignore[arg-type]
    n = 2000
    draws = [draw(temperature, top_p, index=index, min_p=min_p, top_k=top_k) for index in range(n)]
    counts = torch.zeros(vocabulary)
    for token in sample(logits.expand(n, -1), draws):
        assert token is not None
        counts[token] += 1
    assert not counts[expected == 0].any()
    deviation = (expected * (1 - expected) / n).sqrt()
    assert bool(((counts / n - expected).abs() <= 5 * deviation + 1 / n).all())


def test_a_cut_that_cuts_nothing_draws_the_same_tokens() -> None:
    logits = torch.randn(1, 700) * 3
    plain = [sample(logits, [draw(index=index)]) for index in range(60)]
    for none in ({"top_k": 0}, {"top_k": 700}, {"top_k": 10**9}, {"min_p": 0.0}):
        assert [sample(logits, [draw(index=index, **none)]) for index in range(60)] == plain


def test_top_k_keeps_tokens_that_are_as_likely_as_the_last_of_them() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    assert {sample(logits, [draw(index=index, top_k=2)])[0] for index in range(300)} == {1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_barred_tokens_are_never_chosen_and_change_no_other_row(temperature: float) -> None:
    """As transformers' MinNewTokensLength does it; an id that the model does not have bars nothing."""
    logits = torch.randn(3, 9)
    logits[1, 4] = 30.0
    free = sample(logits, [draw(temperature, seed=row) for row in range(3)])
    barred = [draw(temperature, seed=row, barred=(4, 9, -1) if row == 1 else ()) for row in range(3)]
    said = sample(logits, barred)
    processor = MinNewTokensLengthLogitsProcessor(0, 5, [4])
    masked = processor(torch.zeros(3, 2, dtype=torch.long), logits.clone()).clamp(min=-1e30)  # a model's are finite
    expected = sample(masked, [draw(temperature, seed=1)] * 3)
    assert free[1] == 4 != said[1] == expected[1] and said[::2] == free[::2]
    logits[1, 0] = float("nan")
    assert sample(logits, barred)[1] is None

"""Sampling: a row's token depends on its own logits and its own (seed, choice, index), on nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from polygraft.serving.sampling import Draw, sample, uniform


def draw(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, index: int = 0) -> Draw:
    return Draw(temperature, top_p, seed, 0, index)


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

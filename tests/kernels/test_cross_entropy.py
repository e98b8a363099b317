"""Cross-entropy and its gradient in place of the logits: equal to what autograd says in float64, row by row alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.cross_entropy import op, reference
from polygraft.kernels.cross_entropy.op import replace_by_slope

ROWS, WIDTH = 35, 1003
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of bf16, its own rounding


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this machine computes it, and as one without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(op, "function", lambda *_: None)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, WIDTH, generator=generator) * 6).to(dtype)
    factors = torch.rand(ROWS, generator=generator, dtype=torch.float64) - 0.2
    targets = torch.randint(WIDTH, (ROWS,), generator=generator)
    return logits, targets, factors.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_slopes_equal_autograds(dtype: torch.dtype, cap: float | None) -> None:
    logits, targets, factors = inputs(dtype)
    losses, slopes = reference.losses_and_slopes(logits, targets, factors, cap)
    found = replace_by_slope(logits, targets, factors, cap)
    assert (found - losses).norm() <= min(TOLERANCE[dtype], 2e-6) * losses.norm()
    assert (logits - slopes).norm() <= TOLERANCE[dtype] * slopes.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_whatever_its_neighbours_hold(dtype: torch.dtype) -> None:
    logits, targets, factors = inputs(dtype)
    alone = logits[4:5].clone()
    loss = replace_by_slope(alone, targets[4:5], factors[4:5])
    logits[3], logits[5] = float("nan"), float("inf")
    losses = replace_by_slope(logits, targets, factors)
    assert torch.equal(losses[4:5], loss)
    assert torch.equal(logits[4:5], alone)
    assert losses[3].isnan()
    assert losses[5].isnan()
    assert logits[3].isnan().all()
    assert logits[5].isnan().all()


def test_a_token_that_cannot_be_costs_nothing() -> None:
    logits, targets, factors = inputs(torch.float32)
    logits[:, 0], targets[targets == 0] = float("-inf"), 1
    losses = replace_by_slope(logits, targets, factors)
    assert losses.isfinite().all()
    assert logits[:, 0].abs().max() < 1e-30


def test_no_rows_have_no_losses() -> None:
    assert len(replace_by_slope(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0))) == 0

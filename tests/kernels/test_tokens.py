"""The tokens op equals its reference, outputs and gradients; a NaN stays in the rows that use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.tokens import reference
from polygraft.kernels.tokens.op import tokens
from tests.kernels.compare import TOLERANCE, assert_close, run

INDEX = torch.tensor([-1, 0, 1, 2, -1, 4, 4, 4, 0, -1])


def inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"x": torch.randn(10, 7, generator=generator), "p": torch.randn(5, 7, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}, torch.randn(10, 7, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_output_and_gradients_equal_the_reference(add: bool, dtype: torch.dtype) -> None:
    given, upstream = inputs(dtype)
    got = run(tokens, given, INDEX, add, upstream=upstream)
    assert_close(got, run(reference.tokens, given, INDEX, add, upstream=upstream), TOLERANCE[dtype])
    assert not got["d.p"][3].any()  # no row uses it


@pytest.mark.parametrize("add", [False, True])
def test_a_nan_stays_in_the_rows_that_use_it(add: bool) -> None:
    given, upstream = inputs(torch.float32)
    clean = run(tokens, given, INDEX, add, upstream=upstream)
    given["p"][4], upstream[5] = torch.nan, torch.nan
    got = run(tokens, given, INDEX, add, upstream=upstream)
    assert got["out"].isnan().any(1).nonzero().squeeze(1).tolist() == [5, 6, 7]
    assert torch.equal(got["d.p"][:4], clean["d.p"][:4]) and got["d.p"][4].isnan().all()


def test_bf16_rows_are_rounded_once() -> None:
    given, _ = inputs(torch.bfloat16)
    wide = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    out = tokens(given["x"], wide, INDEX, True)
    assert torch.equal(out, reference.tokens(given["x"], wide, INDEX, True)) and out.dtype == torch.bfloat16

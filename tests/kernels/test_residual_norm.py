"""The residual sum and its norm: equal to the reference, rounded where transformers rounds, every row for itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from polygraft.kernels.residual_norm import op, reference
from polygraft.kernels.residual_norm.op import Norm, residual_norm
from tests.kernels.compare import TOLERANCE, assert_as_good_as_steps, assert_close, relative, run

EPS = 1e-6
WIDTHS = (3, 16, 33, 576)


@pytest.fixture(params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this machine computes it, and as one without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(op, "function", lambda *_: None)


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(
    width: int, *, centred: bool, dtype: torch.dtype = torch.float32, rows: int = 7
) -> tuple[Tensor, Tensor, Norm]:
    x, update = normal(rows, width, seed=1, dtype=dtype), normal(rows, width, seed=2, dtype=dtype)
    weight, bias = 1 + normal(width, seed=3, dtype=dtype) / 4, normal(width, seed=4, dtype=dtype)
    return x, update, Norm(weight, bias if centred else None, EPS, centred)


def both(x: Tensor, update: Tensor, norm: Norm) -> Tensor:
    return torch.cat(residual_norm(x, update, norm), dim=1)


def truth(x: Tensor, update: Tensor, norm: Norm) -> Tensor:
    return torch.cat(reference.residual_norm(x, update, norm), dim=1)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_norms_and_gradients_are_the_references(width: int, centred: bool, dtype: torch.dtype) -> None:
    x, update, norm = given(width, centred=centred, dtype=dtype)
    upstream = normal(len(x), 2 * width, seed=5)
    got = run(both, {"x": x, "update": update}, norm, upstream=upstream)
    inputs = {"x": x.double(), "update": update.double()}
    wide = Norm(*(None if p is None else p.double() for p in (norm.weight, norm.bias)), norm.eps, norm.centred)  # type: ignore[arg-type,call-arg]
    assert_close(got, run(truth, inputs, wide, upstream=upstream), TOLERANCE[dtype])


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("centred", [False, True])
def test_in_bf16_it_errs_no_more_than_torchs_own_steps(centred: bool) -> None:
    x, update, norm = given(576, centred=centred, dtype=torch.bfloat16, rows=64)
    upstream = normal(64, 2 * 576, seed=5)

    def steps(x: Tensor, update: Tensor, norm: Norm) -> Tensor:
        s = x + update
        if norm.centred:
            return torch.cat((s, torch.nn.functional.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, EPS)), dim=1)
        module = LlamaRMSNorm(576, EPS)
        module.weight = torch.nn.Parameter(norm.weight, requires_grad=False)  # type: ignore[arg-type]
        return torch.cat((s, module(s)), dim=1)

    inputs = {"x": x, "update": update}
    exact = run(truth, {k: v.double() for k, v in inputs.items()}, norm, upstream=upstream)
    assert_as_good_as_steps(
        run(both, inputs, norm, upstream=upstream), run(steps, inputs, norm, upstream=upstream), exact
    )


def test_in_bf16_it_rounds_where_transformers_rounds() -> None:
    x, update, norm = given(576, centred=False, dtype=torch.bfloat16, rows=64)
    module = LlamaRMSNorm(576, EPS)
    module.weight = torch.nn.Parameter(norm.weight, requires_grad=False)  # type: ignore[arg-type]
    sums, y = residual_norm(x, update, norm)
    assert torch.equal(sums, x + update)
    # The order of a float32 sum of squares is torch's own affair; it moves one number in some thousands by a rounding.
    assert (y != module(x + update)).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_float32_are_not_rounded_for_rows_in_bf16(dtype: torch.dtype) -> None:
    x, update, norm = given(576, centred=False, rows=64)
    x, update = x.to(dtype), update.to(dtype)
    sums, y = residual_norm(x, update, norm)
    exact = reference.residual_norm(sums.double(), torch.zeros_like(sums).double(), norm)[1]
    assert relative(y, exact) < (2.0**-9 if dtype == torch.bfloat16 else 1e-6)  # half a step between two numbers


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads(
    dtype: torch.dtype, centred: bool
) -> None:
    x, update, norm = given(576, centred=centred, dtype=dtype, rows=300)
    torch.set_num_threads(1)
    one = residual_norm(x, update, norm)
    torch.set_num_threads(3)
    many = residual_norm(x, update, norm)
    alone = residual_norm(x[41:42], update[41:42], norm)
    assert all(map(torch.equal, one, many))
    assert all(torch.equal(a, b[41:42]) for a, b in zip(alone, many, strict=True))


@pytest.mark.usefixtures("_way")
def test_a_nan_stays_in_its_row() -> None:
    x, update, norm = given(33, centred=False)
    x[3, 32] = float("nan")
    y = residual_norm(x, update, norm)[1]
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6]].isfinite().all()

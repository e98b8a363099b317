"""silu(gate) * up: equal to the reference, rounded where transformers rounds, every number for itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.swiglu import op, reference
from polygraft.kernels.swiglu.op import swiglu, swiglu_joined
from tests.kernels.compare import TOLERANCE, assert_as_good_as_steps, assert_close, relative, run


@pytest.fixture(params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this machine computes it, and as one without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(op, "function", lambda *_: None)


def halves(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As a fused projection leaves them, side by side, of all sizes that silu has a bend for."""
    both = 4 * torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(1))
    gate, up = both.to(dtype).chunk(2, dim=1)
    return {"gate": gate, "up": up}


def upstream(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("width", [1, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_gradients_are_the_references(width: int, dtype: torch.dtype) -> None:
    inputs = halves(5, width, dtype)
    exact = run(reference.swiglu, {k: v.double() for k, v in inputs.items()}, upstream=upstream(5, width))
    assert_close(run(swiglu, inputs, upstream=upstream(5, width)), exact, TOLERANCE[dtype])


@pytest.mark.usefixtures("_way")
def test_in_bf16_it_errs_no_more_than_transformers_steps() -> None:
    inputs = halves(64, 1536, torch.bfloat16)
    exact = run(reference.swiglu, {k: v.double() for k, v in inputs.items()}, upstream=upstream(64, 1536))
    steps = run(lambda gate, up: F.silu(gate) * up, inputs, upstream=upstream(64, 1536))
    assert_as_good_as_steps(run(swiglu, inputs, upstream=upstream(64, 1536)), steps, exact)


@pytest.mark.usefixtures("_way")
def test_as_halves_of_one_tensor_they_have_the_bits_of_two_and_one_gradient() -> None:
    inputs = halves(5, 17, torch.float32)
    gate, up = (x.requires_grad_() for x in inputs.values())
    both = torch.cat([gate, up], dim=1).detach().requires_grad_()
    two, one = swiglu(gate, up), swiglu_joined(both)
    gradients = torch.autograd.grad(two, (gate, up), upstream(5, 17))
    assert torch.equal(one, two)
    (gradient,) = torch.autograd.grad(one, both, upstream(5, 17))
    assert torch.equal(gradient, torch.cat(gradients, dim=1))


def test_rows_that_are_a_stride_apart_are_read_where_they_lie() -> None:
    gate, up = halves(5, 40, torch.float32).values()
    dense = swiglu(gate.contiguous(), up.contiguous())
    assert torch.equal(swiglu(gate, up), dense)
    assert torch.equal(swiglu(gate[None], up[None])[0], dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_has_the_same_bits_wherever_it_lies_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs, count = halves(64, 1000, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = swiglu(**{f"{name}_TF": x for name, x in inputs.items()})
        torch.set_num_threads(3)
        many = swiglu(**{f"{name}_TF": x for name, x in inputs.items()})
    finally:
        torch.set_num_threads(count)
    alone = swiglu(inputs["gate"][9:10, 3:], inputs["up"][9:10, 3:])
    assert torch.equal(one, many)
    assert torch.equal(alone, many[9:10, 3:])


@pytest.mark.usefixtures("_way")
def test_large_numbers_and_nans_pass_as_silu_has_them() -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0, float("nan"), float("inf")]])
    up = torch.ones_like(gate)
    got, wanted = swiglu(gate, up), gate.double() * gate.double().sigmoid()
    assert relative(got[:, :5], wanted[:, :5]) < 1e-6
    assert got[0, 5].isnan()
    assert got[0, 6] == float("inf")
    assert got[0, 0] == 0
    assert abs(float(got[0, 1])) < 1e-36

"""Many copies at once are torch's copies, one by one, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.copies import op
from polygraft.kernels.copies.op import join, ready

SIZES = (1, 15, 16, 17, 500, 4000)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this machine computes it, and as one without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(op, "function", lambda *_: None)


def numbers(dtype: torch.dtype) -> list[Tensor]:
    """With some that lie between two of bf16, some that have no bits left there, and some that are not finite."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.4e38, float("inf"), float("nan"), -0.0])
    return [torch.cat([odd, torch.randn(n, generator=generator)])[-n:].to(dtype) for n in SIZES]


@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16], ids=str)
def test_copies_have_the_bits_of_torchs(read: torch.dtype, written: torch.dtype) -> None:
    of = numbers(read)
    into, whole = [torch.zeros(n, dtype=written) for n in SIZES], torch.zeros(sum(SIZES), dtype=written)
    ready(into, of)()
    join(whole, of, SIZES)
    for found, place, x in zip(into, whole.split(SIZES), of, strict=True):
        assert torch.equal(found.view(torch.int16), x.to(written).view(torch.int16))
        assert torch.equal(place.view(torch.int16), found.view(torch.int16))


def test_what_there_is_nothing_for_stays_as_it_is() -> None:
    whole = torch.full((6,), 7.0)
    join(whole, [None, torch.ones(2, 1).bfloat16(), None], (1, 2, 3))
    assert whole.tolist() == [7, 1, 1, 7, 7, 7]


def test_tensors_of_several_dtypes_may_be_copied_at_once() -> None:
    of = [torch.randn(3), torch.randn(3).bfloat16(), torch.arange(3)]
    into = [torch.zeros(3) for _ in of]
    ready(into, of)()
    assert all(torch.equal(found, x.float()) for found, x in zip(into, of, strict=True))
    join(whole := torch.zeros(9), of, (3, 3, 3))
    assert torch.equal(whole, torch.cat(into))


def test_a_call_that_is_ready_copies_what_is_there_when_it_is_made() -> None:
    of, into = [torch.zeros(20)], [torch.zeros(20).bfloat16()]
    call = ready(into, of)
    of[0].fill_(3)
    call()
    assert (into[0] == 3).all()


def test_nothing_is_copied_of_nothing() -> None:
    ready([], [])()
    join(torch.zeros(0), [], ())
    join(torch.zeros(3), [None], (3,))

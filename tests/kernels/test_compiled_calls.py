"""Compiled functions: every source builds where the products do, and a call does what its op does, again and again."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from polygraft.kernels.compiled.build import build
from polygraft.kernels.compiled.calls import EXACTLY, Calls, function, structure
from polygraft.kernels.dense import op as dense
from polygraft.kernels.dense.op import Weights
from polygraft.kernels.residual_norm import op as residual_norm
from polygraft.kernels.residual_norm.op import Norm
from polygraft.kernels.swiglu import op as swiglu
from tests.compiled import compiled

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = sorted(path for path in KERNELS.glob("*/*.cpp") if path.parent.name != "dense")
pytestmark = compiled


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_source_builds_where_the_products_do(source: Path) -> None:
    """Else its op would be torch's, and nothing but the time would tell."""
    assert build(source, EXACTLY).exists()


def test_calls_are_made_in_their_order_on_what_their_tensors_hold_by_then() -> None:
    x, y, out = (torch.zeros(3, 8) for _ in range(3))
    calls = [residual_norm.ready(x, None, Norm(None, None, 1e-6, centred=False), y), swiglu.ready(y, x, out)]
    made = Calls([call for call in calls if call is not None])
    for seed in (1, 2):
        x.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))
        made()
        torch.testing.assert_close(out, torch.nn.functional.silu(x / x.square().mean(1, keepdim=True).sqrt()) * x)


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16, 40])
def test_products_that_follow_each_other_are_those_made_alone(rows: int) -> None:
    """Each is told of the next one, whose weights it fetches, however wide and deep that is."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(64, 224), (224, 1536), (1536, 64), (64, 32)]
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    calls, alone = [], [x]
    for terms, width in shapes:
        weights = Weights.packed([(torch.randn(width, terms, generator=generator) / terms**0.5).bfloat16()])
        calls.append(dense.ready(x, weights, (), x := torch.zeros(rows, width, dtype=torch.bfloat16)))
        alone.append(dense.linear(alone[-1], weights)[0])
    Calls(calls)()
    assert torch.equal(x, alone[-1]) and x.any()
    told = [ctypes.c_int64.from_address(call.following).value for call in calls]
    assert told == [*(call.arguments for call in calls[1:]), 0]


def test_a_structure_that_is_laid_out_otherwise_is_refused() -> None:
    source = KERNELS / "swiglu" / "swiglu.cpp"
    with pytest.raises(AssertionError, match="Forward is another structure"):
        function(source, "swiglu", structure("Forward", pointers="gate up out", integers="rows"))

"""The noisy branch on CPU: equal to its reference with the same noise, and every segment a function of itself alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.branch import reference
from polygraft.kernels.branch.noisy import noisy
from polygraft.kernels.common.noise import normal_rows
from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.cases import CASES, Case, branch_inputs
from tests.kernels.compare import TOLERANCE, assert_close, assert_equal, run

SITE = 77


def inputs_of(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The branch's tensors, an upstream gradient, and keys of the rows."""
    inputs, upstream = branch_inputs(case, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 7)
    inputs["G"] = (torch.randn(case.stack_rows, case.d_in, generator=generator, dtype=torch.float64) / 4).to(dtype)
    keys = torch.randint(-(2**31), 2**31, (case.rows,), generator=generator).to(torch.int32)
    return inputs, upstream, keys


@pytest.mark.parametrize("drawn", [True, False], ids=["in training", "served"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype, drawn: bool) -> None:
    inputs, upstream, keys = inputs_of(case, dtype)

    def z_of(s: Segment) -> Tensor:
        return drawn * normal_rows(keys[s.start : s.stop], SITE, s.size, torch.float64)

    rest = (case.segments, case.segments)
    got = run(noisy, inputs, *rest, keys if drawn else None, SITE, upstream=upstream)
    kept = Segments(tuple(s for s in case.segments if s.rows and s.size))
    want = run(reference.noisy, inputs, kept, kept, z_of, upstream=upstream)
    assert_close(got, {name: want.get(name, torch.zeros_like(got[name])) for name in got}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_segments_bits_do_not_change_when_others_join(rows: int, dtype: torch.dtype) -> None:
    own = Case(rows, 12, (Segment(0, rows, 0, 12, 4 / 3),), 576, 192)
    inputs, upstream, keys = inputs_of(own, dtype)
    alone = run(noisy, inputs, own.segments, own.segments, keys, SITE, upstream=upstream)
    segments = Segments(
        (Segment(0, 3, 0, 6, 0.5), Segment(3, 3 + rows, 6, 18, 4 / 3), Segment(3 + rows, rows + 9, 18, 25))
    )
    others, slope, others_keys = inputs_of(Case(rows + 9, 25, (), 576, 192), dtype, seed=1)
    batch, stack = slice(3, 3 + rows), slice(6, 18)
    mine = {"x": batch, "y": batch, "A": stack, "B": stack, "G": stack}
    for name, tensor in inputs.items():
        others[name][mine[name]] = tensor
    slope[batch], others_keys[batch] = upstream, keys
    found = run(noisy, others, segments, segments, others_keys, SITE, upstream=slope)
    places = {"out": batch} | {f"d.{name}": where for name, where in mine.items()}
    assert_equal({name: found[name][places[name]] for name in alone}, alone)


def test_the_noise_is_normal_and_each_rows_and_channels_own() -> None:
    keys = torch.arange(4000, dtype=torch.int32)
    z = normal_rows(keys, SITE, 8, torch.float64)
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02
    assert (torch.corrcoef(z.T) - torch.eye(8)).abs().max() < 0.08
    assert torch.equal(normal_rows(keys[5:9], SITE, 8, torch.float64), z[5:9])
    assert not torch.isin(normal_rows(keys, SITE + 1, 8, torch.float64), z).any()

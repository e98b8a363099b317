"""Attention to rows aside: equal to the obvious softmax, and every segment a function of itself alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.aside import aside
from polygraft.kernels.kv.scores import Scores
from tests.kernels.compare import assert_close, assert_equal, run

HEADS, KV_HEADS, DIM, SCALING = 6, 2, 8, 0.3
CAPS = pytest.mark.parametrize("cap", [None, 0.7], ids=["plain", "capped"])
SEGMENTS = Segments((Segment(1, 4, 0, 5), Segment(4, 13, 5, 6), Segment(15, 22, 6, 16)))


def inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (24, HEADS * DIM), "out": (24, HEADS * DIM), "pk": (16, KV_HEADS * DIM), "pv": (16, KV_HEADS * DIM)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made, torch.randn(shapes["q"], generator=generator).to(dtype)


def op(q: Tensor, out: Tensor, pk: Tensor, pv: Tensor, segments: Segments, cap: float | None) -> Tensor:
    return aside(q, out, pk, pv, segments, KV_HEADS, Scores(SCALING, cap=cap))


def obvious(q: Tensor, out: Tensor, pk: Tensor, pv: Tensor, segments: Segments, cap: float | None) -> Tensor:
    """out + softmax(scaling * q pk^T) pv (Zhang et al. 2023, section 3.2), head by head and by autograd; with scores s
    as cap tanh(s / cap)."""
    for s in segments:
        heads = []
        for head in range(HEADS):
            own = slice(head // (HEADS // KV_HEADS) * DIM, (head // (HEADS // KV_HEADS) + 1) * DIM)
            scores = SCALING * q[s.start : s.stop, head * DIM : (head + 1) * DIM] @ pk[s.first : s.last, own].T
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            heads.append(scores.softmax(-1) @ pv[s.first : s.last, own])
        out = torch.cat([out[: s.start], out[s.start : s.stop] + torch.cat(heads, 1), out[s.stop :]])
    return out


@CAPS
def test_output_and_gradients_are_the_obvious_ones(cap: float | None) -> None:
    given, upstream = inputs(torch.float64)
    got = run(op, given, SEGMENTS, cap, upstream=upstream)
    assert_close(got, run(obvious, given, SEGMENTS, cap, upstream=upstream), 1e-12)


@CAPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segment_has_the_bits_it_has_alone(dtype: torch.dtype, cap: float | None) -> None:
    given, upstream = inputs(dtype)
    whole = run(op, given, SEGMENTS, cap, upstream=upstream)
    for s in SEGMENTS:
        rows, ranks = slice(s.start, s.stop), slice(s.first, s.last)
        own = {name: tensor[ranks if name in ("pk", "pv") else rows] for name, tensor in given.items()}
        only = Segments((Segment(0, s.rows, 0, s.size),))
        alone = run(op, own, only, cap, upstream=upstream[rows])
        cut = {name: whole[name][ranks if name in ("d.pk", "d.pv") else rows] for name in alone}
        assert_equal(cut, alone)

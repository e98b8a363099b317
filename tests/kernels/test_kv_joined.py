"""Gated prefix rows that join a softmax: equal to one softmax over all keys, and every segment a function of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.gate import Gate
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.joined import joined
from polygraft.kernels.kv.layout import Layout, Sequence
from polygraft.kernels.kv.op import attend_with_sums
from polygraft.kernels.kv.scores import Scores
from tests.kernels.compare import Results, assert_close, assert_equal, run

HEADS, KV_HEADS, DIM, WIDTH, SCALING = 6, 2, 8, 10, 0.3
SEQUENCES = (Sequence(1, 3), Sequence(4, 9, 0, 2), Sequence(15, 7))
SEGMENTS = (Segment(1, 4, 0, 6), Segment(4, 13, 6, 8), Segment(15, 22, 8, 17))
GATES = (Segment(1, 4, 0, 3), Segment(4, 13, 3, 4), Segment(15, 22, 4, 7))
ROWS, SIGMOID = 24, Gate("sigmoid")


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kv = KV_HEADS * DIM
    shapes = {"q": (ROWS, HEADS * DIM), "k": (ROWS, kv), "v": (ROWS, kv), "x": (ROWS, WIDTH)}
    shapes |= {"pk": (17, kv), "pv": (17, kv), "G": (7, WIDTH)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made, torch.randn(shapes["q"], generator=generator).to(dtype)


def op(  # noqa: PLR0913
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, pk: Tensor, pv: Tensor, G: Tensor,
    sequences: tuple[Sequence, ...], segments: tuple[Segment, ...], gates: tuple[Segment, ...], gate: Gate,
    cap: float | None = None,
) -> Tensor:  # fmt: skip
    plain = torch.ones(2, k.shape[1], dtype=k.dtype)  # prefix rows in the cache, as another slot has them
    layout = Layout(sequences, len(q), 2, HEADS, KV_HEADS)
    scores = Scores(SCALING, cap=cap)
    out, sums = attend_with_sums(q, k, v, plain, plain, layout, scores)
    return joined(q, out, sums, x, pk, pv, G, Segments(segments), Segments(gates), gate, KV_HEADS, scores)


def obvious(  # noqa: PLR0913
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, pk: Tensor, pv: Tensor, G: Tensor, gate: Gate, cap: float | None
) -> Tensor:
    """Query by query, softmax over [w * pk; ones; k] of [w * pv; ones; v], scores s as cap tanh(s / cap)."""
    out = torch.zeros_like(q)
    for sequence, s, g in zip(SEQUENCES, SEGMENTS, GATES, strict=True):
        weights = gate.weights(x[s.start : s.stop] @ G[g.first : g.last].T).repeat_interleave(s.size // g.size, dim=1)
        for t in range(s.rows):
            seen, plain = slice(s.start, s.start + t + 1), k.new_ones(sequence.prefix_length, k.shape[1])
            keys, values = (
                torch.cat([weights[t, :, None] * prefix[s.first : s.last], plain, own[seen]])
                for prefix, own in ((pk, k), (pv, v))
            )
            heads = []
            for head in range(HEADS):
                own = slice(head // (HEADS // KV_HEADS) * DIM, (head // (HEADS // KV_HEADS) + 1) * DIM)
                scores = SCALING * keys[:, own] @ q[s.start + t, head * DIM : (head + 1) * DIM]
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                heads.append(scores.softmax(0) @ values[:, own])
            out = out.index_copy(0, torch.tensor([s.start + t]), torch.cat(heads)[None])
    return out


@pytest.mark.parametrize("cap", [None, 0.7], ids=["plain", "capped"])
@pytest.mark.parametrize("gate", [SIGMOID, Gate("softmax")], ids=["sigmoid", "softmax"])
def test_output_and_gradients_are_those_of_one_softmax(gate: Gate, cap: float | None) -> None:
    given, upstream = inputs(torch.float64)
    got = run(op, given, SEQUENCES, SEGMENTS, GATES, gate, cap, upstream=upstream)
    assert_close(got, run(obvious, given, gate, cap, upstream=upstream), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_segment_has_the_bits_it_has_alone_whatever_stands_beside_it(dtype: torch.dtype, value: float) -> None:
    given, upstream = inputs(dtype)
    for sequence, s, g in zip(SEQUENCES, SEGMENTS, GATES, strict=True):
        places = {"pk": slice(s.first, s.last), "pv": slice(s.first, s.last), "G": slice(g.first, g.last)}

        def cut(tensors: Results, places: dict[str, slice] = places, s: Segment = s) -> Results:
            return {n: t[places.get(n.removeprefix("d."), slice(s.start, s.stop))] for n, t in tensors.items()}

        others, slope = inputs(dtype, seed=1)
        for tensor in (*others.values(), slope):
            tensor *= value
        for name, tensor in cut(given).items():
            cut(others)[name][:] = tensor
        slope[s.start : s.stop] = upstream[s.start : s.stop]
        company = run(op, others, SEQUENCES, SEGMENTS, GATES, SIGMOID, upstream=slope)
        only = Sequence(0, s.rows, 0, sequence.prefix_length)
        alone = run(
            op,
            cut(given),
            (only,),
            (Segment(0, s.rows, 0, s.size),),
            (Segment(0, s.rows, 0, g.size),),
            SIGMOID,
            upstream=upstream[s.start : s.stop],
        )
        assert_equal(cut(company), alone)


def test_rows_of_no_segment_keep_their_bits() -> None:
    given, _ = inputs(torch.float32)
    tensors = given.values()
    whole, fewer = (op(*tensors, SEQUENCES, SEGMENTS[i:], GATES[i:], SIGMOID) for i in (3, 1))  # type: ignore[arg-type,call-arg]
    assert torch.equal(whole[:4], fewer[:4]) and not torch.equal(whole[4:], fewer[4:])

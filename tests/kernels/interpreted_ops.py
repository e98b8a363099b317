"""As `interpreted`, for the Triton kernels of the other ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch

from polygraft.kernels.affine import gpu as affine_gpu
from polygraft.kernels.affine import reference as affine_reference
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv import gpu as kv_gpu
from polygraft.kernels.kv import op as kv_op
from polygraft.kernels.kv import reference as kv_reference
from polygraft.kernels.kv.layout import Continued
from polygraft.kernels.kv.paged import PagedLayer
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.kv.tiles import PagedTiles
from polygraft.kernels.nf4 import gpu as nf4_gpu
from polygraft.kernels.nf4 import reference as nf4_reference
from polygraft.kernels.norm import gpu as norm_gpu
from polygraft.kernels.norm import reference as norm_reference
from polygraft.kernels.rotate import gpu as rotate_gpu
from polygraft.kernels.rotate import reference as rotate_reference
from polygraft.kernels.rotate.rotation import Rotation
from polygraft.kernels.sparse import gpu as sparse_gpu
from polygraft.kernels.sparse import reference as sparse_reference
from tests.kernels import test_affine, test_kv, test_nf4, test_norm, test_rotate, test_sparse
from tests.kernels.compare import Results, assert_close, assert_equal, relative, run
from tests.kernels.interpreted import TOLERANCE, main

HALF = torch.float16
NAN = float("nan")
# More than one tile of rows and of entries, a gap in both, rows that two segments write.
MANY = (150, 290, (Segment(0, 70, 0, 140, 0.5), Segment(60, 145, 141, 290), Segment(147, 148, 100, 200, 2.0)))


def affine_equals_reference(case: tuple[int, int, tuple[Segment, ...]], dtype: torch.dtype, parts: str) -> None:
    rows, vectors, items = case
    inputs, upstream = test_affine.tensors(rows, vectors, dtype, parts)
    got = run(affine_gpu.affine, inputs, Segments(items), upstream=upstream)
    want = run(affine_reference.affine, inputs, Segments(items), upstream=upstream)
    assert_close(got, want, TOLERANCE[dtype])


def affine_segment_alone(value: float) -> None:
    inputs, upstream = test_affine.tensors(21, 1, HALF, "gb")
    alone = run(affine_gpu.affine, inputs, Segments((Segment(0, 21, 0, 1),)), upstream=upstream)
    joined, gradient = test_affine.tensors(40, 3, HALF, "gb", seed=1)
    for tensor in (*joined.values(), gradient):
        assert tensor is not None
        tensor *= value
    batch, stack = slice(9, 30), slice(1, 2)
    for name, tensor in inputs.items():
        place = joined[name]
        assert place is not None and tensor is not None
        place[batch if name == "y" else stack] = tensor
    gradient[batch] = upstream
    items = Segments((Segment(0, 7, 0, 1), Segment(9, 30, 1, 2), Segment(30, 38, 2, 3)))
    results = run(affine_gpu.affine, joined, items, upstream=gradient)
    assert_equal({n: t[stack if n in ("d.g", "d.b") else batch] for n, t in results.items()}, alone)


def norm_equals_reference(shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> None:
    W, A, B = (tensor.to(dtype) for tensor in test_norm.weights(*shape))
    wide = torch.promote_types(dtype, torch.float32)
    base = W.to(wide).square().sum(1)
    got = norm_gpu.row_norm(base, (A.to(wide) @ W.to(wide).T), A, B, scale)
    error = relative(got, norm_reference.row_norm(W, A, B, scale))
    assert error <= TOLERANCE[wide], error


def kv_equals_reference(case: str, heads: test_kv.Heads, dtype: torch.dtype, scores: Scores = test_kv.SCALING) -> None:
    layout, inputs, upstream = test_kv.batch(test_kv.CASES[case], heads, dtype)
    got = run(kv_gpu.attend, inputs, layout, scores, upstream=upstream)
    want = test_kv.wanted(kv_reference.attend, inputs, layout, upstream, torch.float64, scores)
    assert_close(got, want, 2 * TOLERANCE[dtype])


def kv_sums_are_the_cpus(dtype: torch.dtype) -> None:
    """Log sums of scores beside the output, and the gradients that come through them."""

    def both(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], *given: object) -> torch.Tensor:
        out, sums = op(*given)
        return torch.cat([out, sums.nan_to_num(neginf=0.0)], 1)

    heads = test_kv.Heads(6, 2, 24)
    layout, inputs, upstream = test_kv.batch(test_kv.CASES["prefixes of odd sizes"], heads, dtype)
    slopes = torch.cat([upstream, upstream[:, : heads.queries]], 1)
    got, want = (
        run(partial(both, op), inputs, layout, Scores(0.35), upstream=slopes)
        for op in (kv_gpu.attend_with_sums, kv_op.attend_with_sums)
    )
    assert_close(got, want, 2 * TOLERANCE[dtype])


def kv_sequence_alone(value: float) -> None:
    heads, length, prefix = test_kv.Heads(), 21, 5
    layout, inputs, upstream = test_kv.batch((test_kv.Sequence(0, length, 0, prefix),), heads, HALF)
    alone = own(run(kv_gpu.attend, inputs, layout, test_kv.SCALING, upstream=upstream), 0, length, 0, prefix)
    sequences = (test_kv.Sequence(0, 3, 0, 4), test_kv.Sequence(4, length, 6, prefix), test_kv.Sequence(25, 40))
    layout, joined, gradient = test_kv.batch(sequences, heads, HALF, seed=1)
    for tensor in (*joined.values(), gradient):
        tensor *= value
    for name, tensor in own(inputs, 0, length, 0, prefix).items():
        own(joined, 4, length, 6, prefix)[name][:] = tensor
    gradient[4 : 4 + length] = upstream[:length]
    results = run(kv_gpu.attend, joined, layout, test_kv.SCALING, upstream=gradient)
    assert_equal(own(results, 4, length, 6, prefix), alone)


def own(tensors: Results, start: int, length: int, first: int, prefix: int) -> Results:
    return test_kv.cut(tensors, start, length, first, prefix)


def paged_equals_reference(heads: test_kv.Heads, dtype: torch.dtype, scores: Scores = test_kv.SCALING) -> None:
    """Decode rows, a prefill chunk, a prefix that the layer does not see, blocks out of order; the rest is NaN."""
    sequences = (
        Continued(0, 1, 0, (3,)),
        Continued(1, 1, 37, (7, 1, 5)),
        Continued(3, 20, 9, (2, 9), unseen=3),
        Continued(23, 1, 64, (4, 8, 6, 11, 10), unseen=17),
    )
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(25, heads.queries * heads.size, generator=generator, dtype=torch.float64).to(dtype)
    cache = torch.full((13, 16, 2, heads.keys * heads.size), NAN, dtype=dtype)
    for s in sequences:
        for position in range(s.unseen, s.before + s.rows):
            row = cache[s.blocks[position // 16], position % 16]
            row[:] = torch.randn(row.shape, generator=generator, dtype=torch.float64)
    rest = (sequences, heads.queries, heads.keys, scores)
    sums = torch.full((25, heads.queries), float("-inf"), dtype=torch.promote_types(dtype, torch.float32))
    tiles = PagedTiles.of(sequences, [[s.unseen for s in sequences]], heads.queries // heads.keys)
    got = kv_gpu.attend_paged(q, cache, tiles, PagedLayer(7, *rest[1:]), sums)
    want = kv_reference.attend_paged(q.double(), cache.double(), *rest)
    assert_close({"out": got}, {"out": want}, TOLERANCE[dtype])
    last, group = sequences[-1], heads.queries // heads.keys
    first = last.unseen if scores.window is None else max(last.unseen, last.before + 1 - scores.window)
    seen = cache[list(last.blocks)].flatten(0, 1)[first : last.before + 1, 0].double()
    keys = torch.unflatten(seen, 1, (heads.keys, -1))
    found = [keys[:, head // group] @ one for head, one in enumerate(q[23].double().view(heads.queries, -1))]
    total = scores.scaling * torch.stack(found)
    total = total if scores.cap is None else scores.cap * torch.tanh(total / scores.cap)
    assert_close({"sums": sums[23]}, {"sums": total.logsumexp(1)}, TOLERANCE[dtype])
    assert sums[2].isneginf().all() and sums[3:23].isfinite().all()


def nf4_equals_reference(dtype: torch.dtype, items: tuple[Segment, ...]) -> None:
    inputs = test_nf4.tensors(70, dtype)
    got = nf4_gpu.linear(*inputs, Segments(items), "silu")
    want = nf4_reference.linear(*inputs, Segments(items), "silu")
    assert_close({"out": got}, {"out": want}, TOLERANCE[dtype])


def sparse_equals_reference(case: tuple[int, int, tuple[Segment, ...]], dtype: torch.dtype, indices: int) -> None:
    rows, count, items = case
    inputs, index, upstream = test_sparse.tensors(rows, count, dtype, indices)
    got = run(sparse_gpu.sparse, inputs, index, Segments(items), upstream=upstream)
    want = run(sparse_reference.sparse, inputs, index, Segments(items), upstream=upstream, dtype=torch.float64)
    want = {name: want.get(name, torch.zeros_like(got[name])) for name in got}
    assert_close(got, want, TOLERANCE[dtype])


def sparse_takes_strided_rows_and_gradients(indices: int) -> None:
    rows, count, items = test_sparse.CASES["overlapping"]
    inputs, index, upstream = test_sparse.tensors(rows, count, torch.float32, indices)

    def strided(x: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, y], 1)
        return sparse_gpu.sparse(wide[:, : x.shape[1]], wide[:, x.shape[1] :], v, index, Segments(items))

    got = run(strided, inputs, upstream=upstream.T.contiguous().T)
    assert_close(got, run(sparse_reference.sparse, inputs, index, Segments(items), upstream=upstream), 1e-5)


def sparse_segment_alone(indices: int, value: float) -> None:
    alone, mine = test_sparse.alone_and_joined(sparse_gpu.sparse, 65, HALF, indices, value)
    assert_equal(mine, alone)


def rotate_on_gpu(
    x: torch.Tensor, operands: dict[str, torch.Tensor], rotation: Rotation, segments: Segments
) -> torch.Tensor:
    return rotate_gpu.blocks(x, operands["D"], segments, rotation.size, rotation.stages)


def rotate_equals_reference(case: str, dtype: torch.dtype, kind: str) -> None:
    rows, grafts, items = test_rotate.CASES[case]
    inputs, upstream = test_rotate.tensors(rows, grafts, dtype, kind)
    segments = Segments(tuple(test_rotate.segment(kind, *item) for item in items))
    got = run(test_rotate.named(rotate_on_gpu, kind), inputs, segments, upstream=upstream)
    want = run(test_rotate.named(rotate_reference.rotate, kind), inputs, segments, upstream=upstream)
    assert_close(got, want, TOLERANCE[dtype])


def rotate_segment_alone(kind: str, value: float) -> None:
    alone, mine = test_rotate.alone_and_joined(rotate_on_gpu, 65, HALF, kind, value)
    assert_equal(mine, alone)


def sparse_sorts_an_index_once() -> None:
    inputs, index, upstream = test_sparse.tensors(8, 9, torch.float32, 2)
    orders = []
    for items in ((Segment(0, 8, 0, 9),), (Segment(0, 3, 2, 5), Segment(4, 8, 0, 9))):
        run(sparse_gpu.sparse, inputs, index, Segments(items), upstream=upstream)
        orders.append([index.order(side) for side in (0, 1)])
    assert all(a is b for a, b in zip(*orders, strict=True))


CHECKS: dict[str, Callable[[], None]] = {
    **{f"affine, {name}, {parts}": partial(affine_equals_reference, case, torch.float32, parts)
       for name, case in test_affine.CASES.items() for parts in ("gb", "g", "b")},
    "affine, float64": partial(affine_equals_reference, test_affine.CASES["gathered"], torch.float64, "gb"),
    "affine, float16": partial(affine_equals_reference, test_affine.CASES["gathered"], HALF, "gb"),
    **{f"affine, alone and joined by {value}": partial(affine_segment_alone, value) for value in (1.0, NAN)},
    **{f"norm, {shape}, {dtype}": partial(norm_equals_reference, shape, dtype, 4 / 3)
       for shape in (*test_norm.SHAPES, (70, 100, 65), (33, 40, 256))
       for dtype in (torch.float32, torch.float64)},
    "norm, float16": partial(norm_equals_reference, (70, 100, 17), HALF, -0.5),
    **{f"kv, {name}": partial(kv_equals_reference, name, test_kv.HEADS["grouped"], torch.float32)
       for name in test_kv.CASES},
    "kv, float64": partial(kv_equals_reference, "prefixes of odd sizes", test_kv.Heads(3, 1, 24), torch.float64),
    "kv, float16": partial(kv_equals_reference, "prefixes of odd sizes", test_kv.Heads(), HALF),
    "kv, capped": partial(
        kv_equals_reference, "prefixes of odd sizes", test_kv.HEADS["grouped"], torch.float32, Scores(1.0, cap=1.5)),
    "paged, capped": partial(paged_equals_reference, test_kv.Heads(6, 2, 24), torch.float32, Scores(1.0, cap=1.5)),
    **{f"kv, window {window}, {name}": partial(
           kv_equals_reference, name, test_kv.HEADS["grouped"], torch.float32, Scores(0.35, window))
       for name in ("63 and 65 rows", "prefixes of odd sizes") for window in test_kv.WINDOWS},
    **{f"kv, sums, {dtype}": partial(kv_sums_are_the_cpus, dtype) for dtype in (torch.float32, torch.float64)},
    **{f"kv, alone and joined by {value}": partial(kv_sequence_alone, value) for value in (1.0, NAN)},
    **{f"paged, {dtype}": partial(paged_equals_reference, test_kv.Heads(6, 2, 24), dtype)
       for dtype in (torch.float32, torch.float64, HALF)},
    **{f"paged, window {window}": partial(
           paged_equals_reference, test_kv.Heads(6, 2, 24), torch.float32, Scores(0.35, window))
       for window in test_kv.WINDOWS},
    **{f"nf4, {name}, {dtype}": partial(nf4_equals_reference, dtype, items)
       for name, items in test_nf4.CASES.items() for dtype in (torch.float32, HALF)},
    **{f"sparse, {name}, {kind}": partial(sparse_equals_reference, case, torch.float32, indices)
       for name, case in test_sparse.CASES.items() for kind, indices in test_sparse.KINDS.items()},
    **{f"sparse, {kind}, {dtype}": partial(sparse_equals_reference, MANY, dtype, indices)
       for kind, indices in test_sparse.KINDS.items() for dtype in (torch.float32, torch.float64, HALF)},
    **{f"sparse, strided, {kind}": partial(sparse_takes_strided_rows_and_gradients, indices)
       for kind, indices in test_sparse.KINDS.items()},
    **{f"sparse, alone and joined by {value}, {kind}": partial(sparse_segment_alone, indices, value)
       for kind, indices in test_sparse.KINDS.items() for value in (1.0, NAN)},
    **{f"rotate, blocks.48.1, {case}": partial(rotate_equals_reference, case, torch.float32, "blocks.48.1")
       for case in test_rotate.CASES},
    **{f"rotate, {kind}": partial(rotate_equals_reference, "uncovered rows and grafts", torch.float32, kind)
       for kind in ("blocks.8.1", "blocks.3.1", "blocks.4.3")},
    **{f"rotate, {dtype}": partial(rotate_equals_reference, "uncovered rows and grafts", dtype, "blocks.8.1")
       for dtype in (torch.float64, HALF)},
    **{f"rotate, alone and joined by {value}": partial(rotate_segment_alone, "blocks.48.1", value)
       for value in (1.0, NAN)},
    "sparse, an index is sorted once": sparse_sorts_an_index_once,
}  # fmt: skip

if __name__ == "__main__":
    main(CHECKS)

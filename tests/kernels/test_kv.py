"""Attention over ragged sequences with prefixes: equal to its reference, no sequence a function of another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.kv import reference, whole
from polygraft.kernels.kv.layout import FLOOR, GRAIN, Layout, Sequence
from polygraft.kernels.kv.op import attend, attend_with_sums
from polygraft.kernels.kv.scores import Scores
from tests.compiled import compiled
from tests.kernels.compare import TOLERANCE, Results, assert_as_good_as_steps, assert_close, assert_equal, run


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key heads and the size of each."""

    queries: int = 4
    keys: int = 2
    size: int = 8


CASES = {
    "one row": (Sequence(0, 1),),
    "lengths at the bucket's edge": (Sequence(0, 15), Sequence(15, 16), Sequence(31, 17)),
    "63 and 65 rows": (Sequence(0, 63), Sequence(63, 65)),
    "prefixes of odd sizes": (Sequence(0, 1, 0, 5), Sequence(1, 11, 5, 1), Sequence(12, 30, 6, 17)),
    "with and without prefix": (Sequence(0, 7), Sequence(7, 7, 2, 9), Sequence(14, 3)),
    "a shared prefix": (Sequence(0, 4, 1, 3), Sequence(4, 20, 1, 3), Sequence(24, 5, 1, 3)),
    "rows between sequences": (Sequence(2, 5), Sequence(11, 9, 0, 4)),
    "no sequence": (),
}
HEADS = {"grouped": Heads(), "one key head": Heads(3, 1, 16), "a key head each": Heads(3, 3, 4)}
SCALING = Scores(0.35)
WINDOWS = (1, 5, 16, 40)  # the least, inside a prefix, a tile or a bucket, and beyond most of the sequences


CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])


@CAUSAL
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(
    sequences: tuple[Sequence, ...], dtype: torch.dtype, heads: Heads, causal: bool
) -> None:
    layout, inputs, upstream = batch(sequences, heads, dtype, causal=causal)
    got = run(attend, inputs, layout, SCALING, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES.keys())
def test_a_sliding_window_equals_the_reference(sequences: tuple[Sequence, ...], window: int) -> None:
    layout, inputs, upstream = batch(sequences, Heads(), torch.float64)
    scores = Scores(0.35, window)
    got = run(attend, inputs, layout, scores, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream, scores=scores), TOLERANCE[torch.float64])


@CAUSAL
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES.keys())
def test_capped_scores_equal_the_reference(sequences: tuple[Sequence, ...], causal: bool) -> None:
    layout, inputs, upstream = batch(sequences, Heads(), torch.float64, causal=causal)
    scores = Scores(1.0, window=11 if causal else None, cap=1.5)
    got = run(attend, inputs, layout, scores, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream, scores=scores), TOLERANCE[torch.float64])


@CAUSAL
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES.keys())
def test_a_bias_of_positions_equals_the_reference(sequences: tuple[Sequence, ...], causal: bool) -> None:
    layout, inputs, upstream = batch(sequences, Heads(), torch.float64, causal=causal)
    scores = Scores(1.0, bias=torch.randn(4, 80, 80, generator=torch.Generator().manual_seed(2)).double())
    got = run(attend, inputs, layout, scores, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream, scores=scores), TOLERANCE[torch.float64])


ELSEWHERE = (Sequence(0, 7, source=(3, 40)), Sequence(7, 33, source=(43, 5)), Sequence(41, 2, source=(48, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_keys_of_another_batch_equal_the_reference(dtype: torch.dtype) -> None:
    layout, inputs, upstream = crossing(ELSEWHERE, dtype)
    got = run(attend, inputs, layout, SCALING, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_with_a_source_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    layout, inputs, upstream = crossing(ELSEWHERE, dtype)
    together = run(attend, inputs, layout, SCALING, upstream=upstream)
    for s in ELSEWHERE:
        layout, _, _ = crossing((s,), dtype)
        alone = run(attend, inputs, layout, SCALING, upstream=upstream)
        rows, (first, count) = slice(s.start, s.start + s.length), s.keys
        assert_equal({"out": together["out"][rows], "d.q": together["d.q"][rows]},
                     {"out": alone["out"][rows], "d.q": alone["d.q"][rows]})  # fmt: skip
        assert torch.equal(together["d.k"][first : first + count], alone["d.k"][first : first + count])


def crossing(
    sequences: tuple[Sequence, ...], dtype: torch.dtype, heads: Heads = Heads()
) -> tuple[Layout, dict[str, Tensor], Tensor]:
    """45 rows and 52 rows of keys."""
    _, inputs, upstream = batch((Sequence(0, 43),), heads, dtype, causal=False)
    _, other, _ = batch((Sequence(0, 50),), heads, dtype, seed=1)
    layout = Layout(sequences, 45, 1, heads.queries, heads.keys, causal=False, key_rows=52)
    return layout, {**inputs, "k": other["k"], "v": other["v"]}, upstream


def test_a_row_sees_the_last_rows_of_its_window_and_no_other() -> None:
    layout, inputs, _ = batch((Sequence(0, 20, 0, 5),), Heads(), torch.float32)
    before = attend(*inputs.values(), layout, Scores(0.35, 6))  # type: ignore[arg-type,call-arg]
    inputs["v"][9] += 1
    inputs["pv"][4] += 1  # position 4, which the rows at positions 5 to 9 see
    changed = (attend(*inputs.values(), layout, Scores(0.35, 6)) != before).any(1).nonzero().flatten().tolist()  # type: ignore[arg-type,call-arg]
    assert changed == [0, 1, 2, 3, 4, *range(9, 15)]


WHOLE_VECTORS = {"heads of whole vectors": Heads(9, 3, 64), "a key head each, 48 wide": Heads(2, 2, 48)}


@pytest.mark.parametrize("heads", [*HEADS.values(), *WHOLE_VECTORS.values()], ids=[*HEADS, *WHOLE_VECTORS])
@pytest.mark.parametrize("sequences", [*CASES.values(), (Sequence(0, 150, 0, 20),)], ids=[*CASES, "blocks of queries"])
def test_bf16_is_as_good_as_the_obvious_steps(sequences: tuple[Sequence, ...], heads: Heads) -> None:
    layout, inputs, upstream = batch(sequences, heads, torch.bfloat16)
    got = run(attend, inputs, layout, SCALING, upstream=upstream)
    steps = wanted(in_steps, inputs, layout, upstream)
    truth = wanted(reference.attend, inputs, layout, upstream, torch.float64)
    assert_as_good_as_steps(got, steps, truth)


@compiled
@pytest.mark.parametrize("window", [None, *WINDOWS])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("sequences", [*CASES.values(), (Sequence(0, 150, 0, 20),)], ids=[*CASES, "blocks of queries"])
def test_the_compiled_op_equals_the_reference_as_far_as_bf16_goes(
    sequences: tuple[Sequence, ...], causal: bool, window: int | None
) -> None:
    layout, inputs, upstream = batch(sequences, Heads(6, 2, 32), torch.bfloat16, causal=causal)
    scores = Scores(0.3, window if causal else None)
    assert whole.supports(list(inputs.values()), layout, scores)
    got = run(attend, inputs, layout, scores, upstream=upstream)
    truth = wanted(reference.attend, inputs, layout, upstream, torch.float64, scores)
    for name, value in truth.items():
        assert (got[name].double() - value).norm() <= 6e-3 * value.norm(), name


@compiled
def test_the_compiled_sums_and_their_gradients_equal_autograds() -> None:
    """Of a function of the sums alone, and of one of both, in float64."""
    layout, inputs, _ = batch(CASES["with and without prefix"], Heads(4, 2, 32), torch.bfloat16)
    assert whole.supports(list(inputs.values()), layout, SCALING)
    found, wide = [], [x.double() for x in inputs.values()]
    for values in ([x.clone() for x in inputs.values()], wide):
        leaves = [x.requires_grad_() for x in values]
        out, sums = attend_with_sums(*leaves, layout, SCALING)  # type: ignore[arg-type,call-arg]
        seen = sums.isfinite()
        total = (sums.double()[seen] * 3).sin().sum() + (out.double() * out.double().cos().detach()).sum()
        found.append((sums.detach(), seen, torch.autograd.grad(total, leaves)))
    (sums, seen, ours), (theirs, seen_64, wanted_) = found
    assert torch.equal(seen, seen_64)
    assert (sums[seen].double() - theirs[seen]).norm() <= 1e-5 * theirs[seen].norm()
    for got, want in zip(ours, wanted_, strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sequence_without_a_prefix_has_the_bits_that_it_has_beside_one_with_a_prefix(dtype: torch.dtype) -> None:
    """Whatever dtype the prefix stack has: how a row is computed may not hang on its neighbours."""
    layout, inputs, upstream = batch((Sequence(0, 7),), Heads(4, 2, 32), torch.bfloat16)
    alone = run(attend, inputs, layout, SCALING, upstream=upstream)
    layout, joined, gradient = batch((Sequence(0, 7), Sequence(7, 7, 2, 9)), Heads(4, 2, 32), torch.bfloat16, seed=1)
    for name in "qkv":
        joined[name][:7] = inputs[name][:7]
    gradient[:7] = upstream[:7]
    joined |= {name: joined[name].to(dtype) for name in ("pk", "pv")}
    together = run(attend, joined, layout, SCALING, upstream=gradient)
    assert_equal(cut(together, 0, 7, 0, 0), cut(alone, 0, 7, 0, 0))


@compiled
def test_the_compiled_op_reads_keys_of_another_batch() -> None:
    layout, inputs, upstream = crossing(ELSEWHERE, torch.bfloat16, Heads(4, 2, 32))
    assert whole.supports(list(inputs.values()), layout, SCALING)
    got = run(attend, inputs, layout, SCALING, upstream=upstream)
    for name, value in wanted(reference.attend, inputs, layout, upstream, torch.float64).items():
        assert (got[name].double() - value).norm() <= 6e-3 * value.norm(), name


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_any_sequences_equal_the_reference(gaps_lengths_and_prefixes: list[tuple[int, int, int]]) -> None:
    sequences, end, prefix = [], 0, 0
    for gap, length, prefix_length in gaps_lengths_and_prefixes:
        sequences.append(Sequence(end + gap, length, prefix, prefix_length))
        end, prefix = end + gap + length, prefix + prefix_length
    layout, inputs, upstream = batch(tuple(sequences), Heads(), torch.float64)
    got = run(attend, inputs, layout, SCALING, upstream=upstream)
    assert_close(got, wanted(reference.attend, inputs, layout, upstream), TOLERANCE[torch.float64])


def test_without_gradients_the_output_is_the_same() -> None:
    layout, inputs, upstream = batch(CASES["with and without prefix"], Heads(), torch.bfloat16)
    with torch.inference_mode():
        out = attend(*inputs.values(), layout, SCALING)  # type: ignore[arg-type,call-arg]
    assert torch.equal(out, run(attend, inputs, layout, SCALING, upstream=upstream)["out"])


def test_a_row_sees_nothing_after_itself() -> None:
    layout, inputs, _ = batch((Sequence(0, 20, 0, 5),), Heads(), torch.float32)
    before = attend(*inputs.values(), layout, SCALING)  # type: ignore[arg-type,call-arg]
    for name in "qkv":
        inputs[name][12:] += 1
    assert torch.equal(attend(*inputs.values(), layout, SCALING)[:12], before[:12])  # type: ignore[arg-type,call-arg]


def test_without_causality_a_row_sees_all_of_its_sequence() -> None:
    layout, inputs, _ = batch((Sequence(0, 20, 0, 5), Sequence(20, 3)), Heads(), torch.float32, causal=False)
    before = attend(*inputs.values(), layout, SCALING)  # type: ignore[arg-type,call-arg]
    inputs["v"][19] += 1
    after = attend(*inputs.values(), layout, SCALING)  # type: ignore[arg-type,call-arg]
    assert (after[:20] != before[:20]).any(1).all() and torch.equal(after[20:], before[20:])


@given(st.integers(1, 200), st.integers(0, 100))
def test_a_bucket_is_the_next_multiple_of_the_grain_from_a_floor_on(length: int, prefix: int) -> None:
    bucket = Sequence(7, length, 3, prefix).bucket
    assert bucket % GRAIN == 0 and bucket >= FLOOR
    assert 0 <= bucket - length - prefix < (GRAIN if bucket > FLOOR else FLOOR)


@CAUSAL
@pytest.mark.parametrize("heads", [*HEADS.values(), Heads(9, 3, 64)], ids=str)
@pytest.mark.parametrize("own", [(1, 0), (7, 5), (16, 0), (63, 0), (65, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequences_bits_do_not_change_when_others_join_whatever_they_hold(
    dtype: torch.dtype, own: tuple[int, int], heads: Heads, causal: bool
) -> None:
    length, prefix = own
    layout, inputs, upstream = batch((Sequence(0, length, 0, prefix),), heads, dtype, causal=causal)
    alone = cut(run(attend, inputs, layout, SCALING, upstream=upstream), 0, length, 0, prefix)
    others = [Sequence(0, length, 0, 3), Sequence(length, length), Sequence(2 * length, 5, 3, 40)]
    start, first = 2 * length + 6, 43
    sequences = (
        *others,
        Sequence(start, length, first, prefix),
        Sequence(start + length, length, first + prefix, prefix),
    )
    for value in (1.0, float("nan"), float("inf")):
        layout, joined, gradient = batch(sequences, heads, dtype, seed=1, causal=causal)
        for tensor in (*joined.values(), gradient):
            tensor *= value
        for name, tensor in cut(inputs, 0, length, 0, prefix).items():
            cut(joined, start, length, first, prefix)[name][:] = tensor
        gradient[start : start + length] = upstream[:length]
        results = run(attend, joined, layout, SCALING, upstream=gradient)
        assert_equal(cut(results, start, length, first, prefix), alone)


def cut(tensors: dict[str, Tensor], start: int, length: int, first: int, prefix: int) -> dict[str, Tensor]:
    """One sequence's rows of the batch's tensors and of the prefix stacks'."""
    rows, prefix_rows = slice(start, start + length), slice(first, first + prefix)
    return {name: tensor[prefix_rows if name.endswith(("pk", "pv")) else rows] for name, tensor in tensors.items()}


def wanted(
    op: object,
    inputs: dict[str, Tensor],
    layout: Layout,
    upstream: Tensor,
    dtype: torch.dtype | None = None,
    scores: Scores = SCALING,
) -> Results:
    """The reference's results, 0 for inputs that nothing reaches."""
    if not layout.sequences:
        return {"out": torch.zeros_like(inputs["q"]), **{f"d.{n}": torch.zeros_like(t) for n, t in inputs.items()}}
    results = run(op, inputs, layout, scores, upstream=upstream, dtype=dtype)  # type: ignore[arg-type]
    return {"out": results["out"], **{f"d.{n}": results.get(f"d.{n}", torch.zeros_like(t)) for n, t in inputs.items()}}


def in_steps(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, layout: Layout, scores: Scores) -> Tensor:  # noqa: PLR0913
    """What transformers' eager attention does with each sequence: products in the inputs' dtype, softmax in float32."""
    pieces, end = [], 0
    for s in layout.sequences:
        rows, prefix = slice(s.start, s.start + s.length), slice(s.prefix_first, s.prefix_first + s.prefix_length)
        query = q[rows].unflatten(1, (layout.heads, -1)).transpose(0, 1)
        key, value = (
            torch.cat([p[prefix], x[rows]])
            .unflatten(1, (layout.kv_heads, -1))
            .transpose(0, 1)
            .repeat_interleave(layout.heads // layout.kv_heads, 0)
            for p, x in ((pk, k), (pv, v))
        )
        products = query @ key.transpose(1, 2) * scores.scaling
        hidden = torch.ones(products.shape[1:], dtype=torch.bool).triu(s.prefix_length + 1)
        weights = products.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        pieces += [q.new_zeros(s.start - end, q.shape[1]), (weights @ value).transpose(0, 1).flatten(1)]
        end = s.start + s.length
    return torch.cat([*pieces, q.new_zeros(len(q) - end, q.shape[1])])


def batch(
    sequences: tuple[Sequence, ...], heads: Heads, dtype: torch.dtype, seed: int = 0, *, causal: bool = True
) -> tuple[Layout, dict[str, Tensor], Tensor]:
    """(layout, q, k, v, pk, pv by name, an upstream gradient), with two rows and one prefix row that nobody uses."""
    generator = torch.Generator().manual_seed(seed)
    rows = max((s.start + s.length for s in sequences), default=0) + 2
    prefix_rows = max((s.prefix_first + s.prefix_length for s in sequences), default=0) + 1

    def normal(rows: int, heads_wide: int) -> Tensor:
        return torch.randn(rows, heads_wide * heads.size, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "q": normal(rows, heads.queries),
        "k": normal(rows, heads.keys),
        "v": normal(rows, heads.keys),
        "pk": normal(prefix_rows, heads.keys),
        "pv": normal(prefix_rows, heads.keys),
    }
    layout = Layout(sequences, rows, prefix_rows, heads.queries, heads.keys, causal)
    return layout, inputs, normal(rows, heads.queries)

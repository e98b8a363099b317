"""Dropout by hash: what is dropped is a function of row key, site and channel alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.common.dropout import combine, dropout, keep_mask, mix32
from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.compare import assert_equal, run

words = st.integers(-(2**31), 2**31 - 1)
SITE = 123456789


@given(words)
def test_the_hash_is_lowbias32(word: int) -> None:
    assert mix32(keys(word)).item() == signed(lowbias32(word))


@given(words, words)
def test_combining_hashes_the_seed_and_then_the_word(seed: int, word: int) -> None:
    want = signed(lowbias32(lowbias32(seed + 0x9E3779B9) ^ (word & 0xFFFFFFFF)))
    assert combine(keys(seed), word).item() == want
    assert combine(keys(seed), keys(word)).item() == want


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_kept_in_all_rows_and_channels(p: float) -> None:
    rows, width = 512, 576
    mask = keep_mask(row_keys(rows), SITE, width, p).double()
    for mean, count in ((mask.mean(), rows * width), (mask.mean(0), rows), (mask.mean(1), width)):
        sigma = (p * (1 - p) / count) ** 0.5
        assert (mean - (1 - p)).abs().max() <= 5 * sigma  # the largest of at most 576 normal deviates


def test_masks_of_other_sites_rows_and_channels_agree_by_chance_only() -> None:
    mask = keep_mask(row_keys(512), SITE, 576, 0.5)
    for other in (
        keep_mask(row_keys(512), SITE + 1, 576, 0.5),
        keep_mask(row_keys(513)[1:], SITE, 576, 0.5),
        keep_mask(row_keys(512), SITE, 577, 0.5)[:, 1:],
    ):
        agreeing = (mask == other).double().mean().item()
        assert abs(agreeing - 0.5) <= 5 * (0.25 / mask.numel()) ** 0.5


def test_what_a_higher_rate_keeps_a_lower_rate_keeps_too() -> None:
    high, low = (keep_mask(row_keys(64), SITE, 64, p) for p in (0.5, 0.1))
    assert (low | ~high).all()


@given(st.integers(0, 40), st.integers(1, 40))
def test_a_mask_does_not_depend_on_how_rows_are_split(start: int, rows: int) -> None:
    whole = keep_mask(row_keys(80), SITE, 33, 0.3)
    assert torch.equal(keep_mask(row_keys(80)[start : start + rows], SITE, 33, 0.3), whole[start : start + rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kept_values_are_scaled_and_the_gradient_has_the_same_mask(dtype: torch.dtype) -> None:
    segments = Segments((Segment(1, 4, 0, 2, 1.0, 0.25), Segment(4, 6, 2, 3), Segment(6, 63, 3, 4, 2.0, 0.5)))
    x, upstream = torch.randn(65, 33).to(dtype), torch.randn(65, 33).to(dtype)
    got = run(dropout, {"x": x}, segments, row_keys(65), SITE, upstream=upstream)
    for tensor, given_ in ((got["out"], x), (got["d.x"], upstream)):
        want = given_.clone()
        for rows, p in ((slice(1, 4), 0.25), (slice(6, 63), 0.5)):
            kept = keep_mask(row_keys(65)[rows], SITE, 33, p)
            want[rows] = torch.where(kept, given_[rows] / (1 - p), 0)
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_are_the_same_alone_split_and_among_others(dtype: torch.dtype) -> None:
    x, upstream = torch.randn(70, 33).to(dtype), torch.randn(70, 33).to(dtype)
    whole = Segments((Segment(0, 5, 0, 1, 1.0, 0.9), Segment(5, 70, 0, 4, 1.0, 0.1)))
    joined = run(dropout, {"x": x}, whole, row_keys(70), SITE, upstream=upstream)
    for start, stop in ((5, 70), (5, 12), (12, 70), (69, 70)):
        alone = run(
            dropout,
            {"x": x[start:stop]},
            Segments((Segment(0, stop - start, 0, 4, 1.0, 0.1),)),
            row_keys(70)[start:stop],
            SITE,
            upstream=upstream[start:stop],
        )
        assert_equal({name: tensor[start:stop] for name, tensor in joined.items()}, alone)


def test_what_is_not_finite_is_dropped_like_any_value() -> None:
    x = torch.full((4, 64), float("nan"))
    x[2:] = 1.0
    out = dropout(x, Segments((Segment(0, 4, 0, 1, 1.0, 0.5),)), row_keys(4), SITE)
    mask = keep_mask(row_keys(4), SITE, 64, 0.5)
    assert (out[:2][~mask[:2]] == 0).all() and out[:2][mask[:2]].isnan().all() and out[2:].isfinite().all()


def keys(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int32)


def row_keys(rows: int) -> Tensor:
    """Keys as the trainers make them: a hash of (sample, token)."""
    return combine(keys(7).expand(rows), torch.arange(rows, dtype=torch.int32))


def lowbias32(h: int) -> int:
    """Wellons 2018, on Python's integers."""
    h &= 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ h >> 15) * 0x846CA68B & 0xFFFFFFFF
    return h ^ h >> 16


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word

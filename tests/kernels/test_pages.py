"""Copies in large pages: equal, aligned, apart from each other, and there for as long as they are held."""

from __future__ import annotations

import gc
import weakref

import torch

from polygraft.kernels.dense.pages import AREA, LargePages


def test_copies_are_equal_aligned_and_do_not_overlap() -> None:
    pages = LargePages()
    given = [torch.arange(n, dtype=torch.int32).view(-1, 1) for n in (1, 33, 70_000)]
    found = [pages.copy(x) for x in given]
    for x, copy in zip(given, found, strict=True):
        assert torch.equal(copy, x) and copy.data_ptr() % 64 == 0 and copy.is_contiguous()
    found[0].fill_(-1)
    assert torch.equal(found[1], given[1])


def test_what_is_larger_than_an_area_has_one_of_its_own() -> None:
    x = torch.zeros(AREA + 1, dtype=torch.uint8)
    assert LargePages().copy(x).shape == x.shape


def test_an_area_lives_as_long_as_its_copies() -> None:
    pages = LargePages()
    first, second = pages.copy(torch.ones(5)), pages.copy(torch.full((5,), 2.0))
    gone = weakref.ref(first)
    del first, pages
    gc.collect()
    assert gone() is None and second.tolist() == [2.0] * 5

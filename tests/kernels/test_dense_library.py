"""The compiled part of the dense op is the one that structures.py describes; and it is gone without."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.kernels.compiled.build import Unavailable, build
from polygraft.kernels.dense import library
from tests.compiled import compiled


def test_what_is_no_library_leaves_the_products_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "linear-0.so"
    path.write_text("built")
    with pytest.raises(Unavailable, match=r"linear-.*so"):
        library.load(path)
    monkeypatch.setattr(library, "build", lambda source: path)
    assert library.library.__wrapped__() is None


@compiled
def test_structures_that_differ_are_told_by_name_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = build(library.SOURCE), library.SIZES["Branch"]  # type: ignore[attr-defined]
    monkeypatch.setitem(library.SIZES, "Branch", size - 8)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=f"Branch has {size} bytes in linear.cpp and {size - 8} in structures.py"):
        library.load(path)

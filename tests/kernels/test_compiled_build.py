"""How the compiled part of the dense op is found, built and kept; and that it is gone without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polygraft.kernels.dense import library


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that caches are kept in, on a CPU that says it has AMX, too."""
    monkeypatch.setattr(library, "_features", lambda: library.VECTORS | library.TILES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(library.LIMIT, raising=False)
    return tmp_path / "polygraft" / "kernels"


def compiler(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


COPY = 'while [ "$1" != "-o" ]; do shift; done; echo built >> "$2"; echo run >> "$(dirname "$0")/runs"'


def test_it_is_built_once_and_found_again(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", COPY, monkeypatch)
    first, second = library.build(), library.build()
    assert first == second and first.read_text() == "built\n" and (tmp_path / "runs").read_text() == "run\n"
    assert os.listdir(amx) == [first.name], "nothing else may be left"


def test_another_cpu_builds_its_own(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", COPY, monkeypatch)
    first = library.build()
    monkeypatch.setattr(library, "_features", lambda: library.VECTORS | {"avx10"})
    assert library.build() != first


def test_a_compiler_that_fails_is_named_with_its_words(
    amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "cxx", "echo unknown option >&2; exit 1", monkeypatch)
    with pytest.raises(library.Unavailable, match=r"cxx cannot build linear.cpp: unknown option"):
        library.build()
    assert os.listdir(amx) == []


def test_no_compiler_says_what_to_install(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(library.Unavailable, match=r"install g\+\+"):
        library.build()


def test_a_cpu_without_products_of_bf16_is_named_by_what_it_lacks(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_features", lambda: library.VECTORS - {"avx512_bf16"})
    with pytest.raises(library.Unavailable, match="no avx512_bf16"):
        library.build()


def test_tiles_are_used_where_there_are_any(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", 'echo "$@" > "$(dirname "$0")/flags"; ' + COPY, monkeypatch)
    library.build()
    assert "-DAMX" in (tmp_path / "flags").read_text()
    monkeypatch.setattr(library, "_features", lambda: library.VECTORS)
    library.build()
    assert "-DAMX" not in (tmp_path / "flags").read_text()


def test_a_limit_on_onednn_is_one_on_us(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", 'echo "$@" > "$(dirname "$0")/flags"; ' + COPY, monkeypatch)
    monkeypatch.setenv(library.LIMIT, "AVX2")
    with pytest.raises(library.Unavailable, match="AVX2"):
        library.build()
    for limit, tiles in (("AVX512_CORE_BF16", False), ("avx512_core_amx", True)):
        monkeypatch.setenv(library.LIMIT, limit)
        library.build()
        assert ("-DAMX" in (tmp_path / "flags").read_text()) == tiles


def test_what_is_no_library_leaves_the_products_to_torch(
    amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "cxx", COPY, monkeypatch)
    with pytest.raises(library.Unavailable, match="linear-.*so"):
        library.load(library.build())
    assert library.library.__wrapped__() is None


@pytest.mark.skipif(library.library() is None, reason="no AVX-512 for bf16 or no compiler on this machine")
def test_structures_that_differ_are_told_by_name_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = library.build(), library.SIZES["Branch"]
    monkeypatch.setitem(library.SIZES, "Branch", size - 8)
    with pytest.raises(TypeError, match=f"Branch has {size} bytes in linear.cpp and {size - 8} in structures.py"):
        library.load(path)

"""How a source is found, built and kept; and that it is gone without a compiler or the instructions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polygraft.kernels.compiled import build as module
from polygraft.kernels.dense.library import SOURCE


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that caches are kept in, on a CPU that says it has AMX, too."""
    monkeypatch.setattr(module, "_features", lambda: module.VECTORS | module.TILES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(module.LIMIT, raising=False)
    return tmp_path / "polygraft" / "kernels"


def compiler(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


COPY = 'while [ "$1" != "-o" ]; do shift; done; echo built >> "$2"; echo run >> "$(dirname "$0")/runs"'


def test_it_is_built_once_and_found_again(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", COPY, monkeypatch)
    first, second = module.build(SOURCE), module.build(SOURCE)
    assert first == second and first.read_text() == "built\n" and (tmp_path / "runs").read_text() == "run\n"
    assert os.listdir(amx) == [first.name], "nothing else may be left"


def test_another_cpu_builds_its_own(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", COPY, monkeypatch)
    first = module.build(SOURCE)
    monkeypatch.setattr(module, "_features", lambda: module.VECTORS | {"avx10"})
    assert module.build(SOURCE) != first


def test_a_compiler_that_fails_is_named_with_its_words(
    amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "cxx", "echo unknown option >&2; exit 1", monkeypatch)
    with pytest.raises(module.Unavailable, match=r"cxx cannot build linear.cpp: unknown option"):
        module.build(SOURCE)
    assert os.listdir(amx) == []


def test_no_compiler_says_what_to_install(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(module.Unavailable, match=r"install g\+\+"):
        module.build(SOURCE)


def test_a_cpu_without_products_of_bf16_is_named_by_what_it_lacks(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_features", lambda: module.VECTORS - {"avx512_bf16"})
    with pytest.raises(module.Unavailable, match="no avx512_bf16"):
        module.build(SOURCE)


def test_tiles_are_used_where_there_are_any(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", 'echo "$@" > "$(dirname "$0")/flags"; ' + COPY, monkeypatch)
    module.build(SOURCE)
    assert "-DAMX" in (tmp_path / "flags").read_text()
    monkeypatch.setattr(module, "_features", lambda: module.VECTORS)
    module.build(SOURCE)
    assert "-DAMX" not in (tmp_path / "flags").read_text()


def test_a_limit_on_onednn_is_one_on_us(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cxx", 'echo "$@" > "$(dirname "$0")/flags"; ' + COPY, monkeypatch)
    monkeypatch.setenv(module.LIMIT, "AVX2")
    with pytest.raises(module.Unavailable, match="AVX2"):
        module.build(SOURCE)
    for limit, tiles in (("AVX512_CORE_BF16", False), ("avx512_core_amx", True)):
        monkeypatch.setenv(module.LIMIT, limit)
        module.build(SOURCE)
        assert ("-DAMX" in (tmp_path / "flags").read_text()) == tiles

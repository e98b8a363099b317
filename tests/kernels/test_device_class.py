"""The class of a device names what decides the bits of a result, and nothing that changes from call to call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.kernels.compiled import build
from polygraft.kernels.compiled.build import Toolchain
from polygraft.kernels.dense import device_class as module
from polygraft.kernels.dense.device_class import device_class
from tests.compiled import compiled


def test_a_process_is_of_one_class() -> None:
    assert device_class() == device_class()
    assert str(torch.get_num_threads()) in str(device_class()) and torch.__version__ in str(device_class())


def test_other_threads_are_another_class() -> None:
    threads, here = torch.get_num_threads(), device_class()
    torch.set_num_threads(threads + 1)
    try:
        assert device_class() != here
    finally:
        torch.set_num_threads(threads)


@compiled
def test_ops_of_torch_are_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    here = device_class()
    monkeypatch.setattr(module, "library", lambda: None)
    assert here.compiled and not device_class().compiled and "of torch" in str(device_class())


def test_a_digest_is_of_sources_headers_compiler_flags_and_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "op").mkdir()
    source, header = tmp_path / "op" / "op.cpp", tmp_path / "op" / "op.h"
    source.write_text("one")
    header.write_text("two")
    tools = Toolchain("g++", ("-O3",), ("avx512_bf16",))
    found = [tools.digest([source]), tools.digest([source], "-g")]
    found += [Toolchain("clang", *given).digest([source]) for given in ((("-O3",), ("amx",)), (("-O2",), ("amx",)))]
    header.write_text("three")
    found.append(tools.digest([source]))
    source.write_text("four")
    found.append(tools.digest([source]))
    assert len(set(found)) == len(found)

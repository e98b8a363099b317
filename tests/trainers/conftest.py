"""What the packs of these tests are made on, and how long they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.runtime.backbone import Backbone
from tests.tiny import tiny_llama


@pytest.fixture(params=[6, pytest.param(20, marks=pytest.mark.nightly)], ids=lambda steps: f"{steps} steps")
def steps(request: pytest.FixtureRequest) -> int:
    """Optimiser steps that every job takes at least."""
    return int(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fp64(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float64, training=True)

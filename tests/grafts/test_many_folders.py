"""Many folders made elsewhere, read and kept by one process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.description import DESCRIPTION
from polygraft.grafts.formats.read import read
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from tests.grafts.oracle.row import random_tensors


@pytest.mark.nightly
def test_a_hundred_loras_are_imported_within_thirty_seconds(smollm2_folder: Path, tmp_path: Path) -> None:
    """On SmolLM2's shape, all projections, rank 16: 20 MB each, read from PEFT's files and saved as ours and PEFT's."""
    backbone = Backbone.load(smollm2_folder, torch.bfloat16)
    graft = BoundGraft(parse("lora(r=16)"), backbone.shape)
    values = {name: value.float() for name, value in random_tensors(graft, seed=1).items()}
    backbone_files = BackboneFiles(backbone.folder)
    first, spent = next(iter(values)), 0.0
    for number in range(100):
        folder = tmp_path / "theirs"
        peft.export(folder, graft, values | {first: values[first] + number})
        begun = time.perf_counter()
        found, read_values = read(folder, backbone_files, backbone.fingerprint)
        identity = native.save(
            tmp_path / "ours", found, read_values, backbone=backbone.fingerprint, backbone_files=backbone_files
        )
        spent += time.perf_counter() - begun
        assert (tmp_path / "ours" / identity / DESCRIPTION).is_file()
    assert len(list((tmp_path / "ours").iterdir())) == 100
    assert spent < 30

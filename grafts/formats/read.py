"""A graft's folder of any format that is read here, told apart by the files in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import adapterhub, native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.description import DESCRIPTION


def read(folder: Path, backbone_files: BackboneFiles, fingerprint: str) -> tuple[BoundGraft, Mapping[str, Tensor]]:
    """Our own folder, PEFT's or AdapterHub's, for the backbone of these files and this fingerprint.

    Raises FormatError for another, or a graft that does not fit.
    """
    if (folder / DESCRIPTION).exists():
        stored = native.load(folder, shape=backbone_files.shape, backbone=fingerprint)
        return stored.graft, stored.tensors
    config = peft.config_of(folder)
    if adapterhub.wrote(config):
        return adapterhub.load(folder, backbone_files)
    return peft.load(folder, backbone_files.shape, backbone_files)

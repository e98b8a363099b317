"""What a native graft folder says of itself, read without its tensors, and without torch."""

from __future__ import annotations

import json
from pathlib import Path

from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.files import json_object
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import GraftSpec, SpecError

DESCRIPTION = "graft.json"


def described(folder: Path) -> GraftSpec:
    """What the folder says that its graft is; raises FormatError."""
    try:
        return GraftSpec.from_json(json.dumps(json_object(folder, DESCRIPTION).get("spec")))
    except SpecError as error:
        raise FormatError(f"{folder.name}: {error}") from None


def grown_on(folder: Path) -> tuple[ModelShape, str]:
    """The shape and the fingerprint of the backbone that the folder names; raises FormatError."""
    described = json_object(folder, DESCRIPTION)
    try:
        return ModelShape(**described["shape"]), str(described["backbone"])  # type: ignore[arg-type]
    except (KeyError, TypeError):
        raise FormatError(f"{folder.name}/{DESCRIPTION}: names no backbone") from None

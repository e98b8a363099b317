"""The files of a folder that somebody else made: what may be opened, and how much of it."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue
from safetensors import SafetensorError

from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.text.plain_json import load as load_json

if TYPE_CHECKING:
    from torch import Tensor

_PICKLED = ("*.bin", "*.pt", "*.pth")
_LARGEST_JSON = 4 << 20
_LARGEST_HEADER = 16 << 20  # of a safetensors file: that of 100,000 tensors


def file(folder: Path, name: str) -> Path:
    """A regular file of the folder; nothing is opened.

    A link may lead to another place in the folder, or from a snapshot in a Hugging Face cache to the blobs of its own
    repository. Raises FormatError for any other, and for what is no regular file.
    """
    place = folder / name
    try:
        kind = place.stat().st_mode
    except (OSError, ValueError):  # a link in a circle, a name with a zero byte
        pickled = sorted(found.name for pattern in _PICKLED for found in folder.glob(pattern))
        why = f"; {pickled[0]} can run code when loaded: convert it to safetensors" if pickled else ""
        raise FormatError(f"{folder.name}: holds no {name}{why}") from None
    if not stat.S_ISREG(kind):
        raise FormatError(f"{folder.name}/{name}: is no regular file")
    own, real = folder.resolve(), place.resolve()
    if not any(real.is_relative_to(root) for root in (own, *_blobs(own))):
        raise FormatError(f"{folder.name}/{name}: is a link out of the folder")
    return place


def json_object(folder: Path, name: str) -> Mapping[str, JsonValue]:
    """What a JSON file of the folder says; raises FormatError for one that is too long, or no object."""
    place = file(folder, name)
    try:
        if (size := place.stat().st_size) > _LARGEST_JSON:
            raise FormatError(f"{folder.name}/{name}: {size} bytes; at most {_LARGEST_JSON}")
        value = load_json(place.read_bytes())
    except OSError as error:
        raise FormatError(f"{folder.name}/{name}: {error}") from None
    except ValueError as error:
        raise error if isinstance(error, FormatError) else FormatError(f"{folder.name}/{name}: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{folder.name}/{name}: not an object")
    return value


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Those of a safetensors file of the folder; raises FormatError for one that is broken."""
    from safetensors.torch import load_file

    place = file(folder, name)
    try:
        with place.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > _LARGEST_HEADER:
            raise FormatError(f"{folder.name}/{name}: a header of {header} bytes; at most {_LARGEST_HEADER}")
        return load_file(place)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{folder.name}/{name}: {error}") from None


def _blobs(folder: Path) -> tuple[Path, ...]:
    """Where a Hugging Face cache keeps the files of the snapshot that the folder, which is no link, lies in."""
    for above in folder.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            return (above.parent / "blobs",)
    return ()

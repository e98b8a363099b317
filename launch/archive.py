"""A graft's folder as the tar archive that the HTTP API takes and gives."""

from __future__ import annotations

import tarfile
from pathlib import Path


def pack(folder: Path, target: Path) -> None:
    """The folder's regular files; folders inside and hidden files are left out. Raises FormatError for a link out of
    the folder, so that nothing is sent that is not the graft's."""
    from polygraft.grafts.formats.files import file

    with tarfile.open(target, "w") as out:
        for path in sorted(folder.iterdir()):
            if path.is_dir() or path.name.startswith("."):
                continue
            out.add(file(folder, path.name).resolve(), path.name)


def unpack(archive: Path, folder: Path) -> None:
    """The files of a service's archive into a new folder."""
    folder.mkdir()
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")

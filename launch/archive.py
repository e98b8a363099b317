"""A graft's folder as the tar archive that the HTTP API takes and gives."""

from __future__ import annotations

import tarfile
from pathlib import Path

from polygraft.launch.output import Failure, Status


def pack(folder: Path, target: Path) -> None:
    """The folder's regular files; folders inside and hidden files are left out. Raises Failure for a link that leads
    out of the folder, so that nothing is sent that is not the graft's."""
    with tarfile.open(target, "w") as out:
        for path in sorted(folder.iterdir()):
            if path.is_dir() or path.name.startswith("."):
                continue
            if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
                raise Failure(f"{path}: is no regular file of the folder", Status.USAGE)
            out.add(path.resolve(), path.name)


def unpack(archive: Path, folder: Path) -> None:
    """The files of a service's archive into a new folder."""
    folder.mkdir()
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")

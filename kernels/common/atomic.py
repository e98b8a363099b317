"""Files and folders that must be whole.

Each is written under a temporary name in its own folder, synced to disk, renamed, and the folder synced. Whoever looks,
after a kill or a power cut too, finds what was there before or all of what was written, and once a function returns it
is the latter. A writer that is killed may leave its draft, a hidden name that begins as `remove_drafts` expects.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """The path of an empty file to write; it takes the place of `target` when the block ends well.

    Raises OSError; then, as when the block raises, `target` is as it was.
    """
    make_folder(target.parent)
    handle, name = tempfile.mkstemp(prefix=_prefix(target), dir=target.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(mode)
        sync(draft)
        move(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def write_text(target: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a small file by `text`. Nobody whom `mode` shuts out can read it at any time."""
    with whole_file(target, mode=mode) as draft:
        draft.write_text(text)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well; all may read what is in it.

    Raises OSError, also where `target` has become a folder with something in it; then, as when the block raises, it is
    as it was.
    """
    make_folder(target.parent)
    draft = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        yield draft
        for path in (*draft.rglob("*"), draft):
            path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp and safetensors shut others out
            sync(path)
        move(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Rename what is on disk to a name in the same file system; the new name is on disk, too, on return."""
    os.replace(source, target)
    sync(target.parent)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder and its parents where they are missing, and wait until their names are on disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True, mode=mode)
        sync(folder.parent)


def remove_drafts(target: Path) -> None:
    """Remove what killed writers of `target` left; only for whoever knows that no other writer is alive."""
    for draft in target.parent.glob(f"{_prefix(target)}*"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.draft-"

"""Archives of strangers: what is read of them, and what is refused before it is anywhere."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from polygraft.serving.http.archives import BadArchive, TooLarge, packed, unpack

LIMIT = 100_000
Fill = Callable[[tarfile.TarFile], None]


def tar(fill: Fill, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        fill(archive)
    return out.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(content)
    entry.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    archive.addfile(entry, io.BytesIO(content))


def each(archive: tarfile.TarFile, *names: str, content: bytes = b"x") -> None:
    for name in names:
        add(archive, name, content)


def files(**contents: bytes) -> bytes:
    def fill(archive: tarfile.TarFile) -> None:
        for name, content in contents.items():
            add(archive, name, content)

    return tar(fill)


def read(raw: bytes, tmp_path: Path, limit: int = LIMIT) -> dict[str, bytes]:
    (tmp_path / "archive").write_bytes(raw)
    unpack(tmp_path / "archive", tmp_path / "target", limit_bytes=limit)
    return {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}


@pytest.mark.parametrize("top", ["", "mine/", "./", "./mine/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_files_of_one_folder_are_read_plain_or_gzipped(top: str, zipped: bool, tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        add(archive, f"{top}a.json", b"{}")
        add(archive, f"{top}w", bytes(5_000))
        add(archive, f"{top}runs/deeper/log", b"left out")

    raw = tar(fill)
    assert read(gzip.compress(raw) if zipped else raw, tmp_path) == {"a.json": b"{}", "w": bytes(5_000)}


HOSTILE: dict[str, tuple[Fill, str]] = {
    "absolute": (lambda a: add(a, "/etc/x"), "no plain path"),
    "parent": (lambda a: add(a, "../x"), "no plain path"),
    "parent inside": (lambda a: add(a, "a/../../x"), "no plain path"),
    "backslash": (lambda a: add(a, "..\\x"), "no plain path"),
    "control": (lambda a: add(a, "a\nb"), "no plain path"),
    "long": (lambda a: add(a, "x" * 300), "no plain path"),
    "symbolic link": (lambda a: add(a, "x", b"", tarfile.SYMTYPE), "no regular file"),
    "hard link": (lambda a: add(a, "x", b"", tarfile.LNKTYPE), "no regular file"),
    "device": (lambda a: add(a, "x", b"", tarfile.CHRTYPE), "no regular file"),
    "fifo": (lambda a: add(a, "x", b"", tarfile.FIFOTYPE), "no regular file"),
    "sparse": (lambda a: add(a, "x", b"", tarfile.GNUTYPE_SPARSE), "no regular file"),
    "twice": (lambda a: each(a, "x", "x"), "in the archive twice"),
    "two folders": (lambda a: each(a, "a/x", "b/x"), "more than one folder"),
    "nothing": (lambda a: None, "no files"),
    "only folders": (lambda a: add(a, "a", b"", tarfile.DIRTYPE), "no files"),
    "many": (lambda a: each(a, *map(str, range(1_001))), "more than 1000 members"),
    "large": (lambda a: add(a, "x", bytes(LIMIT + 1)), "larger than the limit"),
    "large together": (lambda a: each(a, *"abcd", content=bytes(LIMIT // 3)), "larger than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_leads_out_or_stands_for_something_else_or_grows_is_refused(kind: str, tmp_path: Path) -> None:
    fill, said = HOSTILE[kind]
    with pytest.raises(BadArchive, match=said):
        read(tar(fill), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]


def test_a_bomb_is_given_up_at_the_limit(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="more than the limit"):
        read(gzip.compress(bytes(50_000_000)), tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "target").iterdir()) < 2_000_000


def test_a_header_of_megabytes_is_never_held(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 3 << 20
    with pytest.raises(BadArchive, match="header of megabytes"):
        read(entry.tobuf(tarfile.USTAR_FORMAT) + bytes(3 << 20), tmp_path, limit=1 << 30)


def test_headers_in_headers_and_broken_archives_are_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2
    nested = (entry.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)) * 5_000
    whole = files(a=bytes(3_000))
    broken = (nested, whole[:1_500], b"", b"not a tar" * 99, gzip.compress(whole)[:-9], b"\x1f\x8b", bytes(1 << 16))
    for number, raw in enumerate(broken):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(BadArchive):
            read(raw, folder)


def test_what_is_exported_is_read_by_the_standard_library(tmp_path: Path) -> None:
    contents = {"graft.json": b"{}", "graft.safetensors": bytes(range(256)) * 5_000, "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    raw = b"".join(packed([(name, (tmp_path / name).open("rb")) for name in contents]))
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        found = {member.name: archive.extractfile(member) for member in archive}
        assert {name: file.read() for name, file in found.items() if file} == contents


@pytest.mark.parametrize("at", [1_024, 1_024 + 100])
def test_an_archive_that_was_cut_off_between_two_files_is_refused(at: int, tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="has no end"):
        read(files(first=b"x", second=b"x")[:at], tmp_path)


def test_a_damaged_header_between_two_files_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = files(first=b"x", second=b"x")
    with pytest.raises(BadArchive, match="has no end"):
        read(whole[:1_024] + b"?" * 10 + whole[1_034:], tmp_path)

"""The key that a service has before anyone could ask it for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.cluster.api_keys import list_keys, verify_key
from polygraft.cluster.settings import BadSettings
from polygraft.cluster.store.memory import MemoryStore
from polygraft.launch.first_key import admit_given_key, make_local_key

FIRST, SECOND = ("pg-" + letter * 32 for letter in "ab")


def test_the_first_start_makes_a_key_that_only_its_owner_can_read_and_later_ones_keep_it(tmp_path: Path) -> None:
    store, path = MemoryStore(), tmp_path / "home" / "key"
    make_local_key(store, path)
    text = path.read_text()
    assert verify_key(store, text.strip()) and path.stat().st_mode & 0o777 == 0o600
    make_local_key(store, path)
    assert path.read_text() == text and len(list_keys(store)) == 1
    make_local_key(another := MemoryStore(), path)
    assert path.read_text() != text and verify_key(another, path.read_text().strip())


def test_a_key_in_a_file_is_taken_and_the_one_before_it_is_worth_nothing(tmp_path: Path) -> None:
    store, file = MemoryStore(), tmp_path / "key"
    for text, worth in ((FIRST, [True, False]), (FIRST, [True, False]), (SECOND, [False, True])):
        file.write_text(text + "\n")
        assert admit_given_key(store, file).digest
        assert [verify_key(store, one) is not None for one in (FIRST, SECOND)] == worth
    assert len(list_keys(store)) == 2


@pytest.mark.parametrize("raw", [None, b"\xff\xfe", b"", b"pg-short", b"sk-" + b"a" * 40])
def test_a_file_that_holds_no_key_is_named(raw: bytes | None, tmp_path: Path) -> None:
    store, file = MemoryStore(), tmp_path / "key"
    if raw is not None:
        file.write_bytes(raw)
    with pytest.raises(BadSettings, match=f"api_key_file: {file}: "):
        admit_given_key(store, file)
    assert not list_keys(store)

"""What `polygraft doctor` finds, and what it advises where something is wrong."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from polygraft.cluster.settings import Settings, load
from polygraft.launch import checks
from polygraft.launch.checks import Finding, examine


def found(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Finding]:
    """By check; those that compile or start something are left to `doctor` itself."""
    for slow in ("_valkey", "_device", "_products"):
        monkeypatch.setattr(checks, slow, lambda _: Finding("slow", "ok", ""))
    return {one.check: one for one in examine(settings)}


def test_a_machine_that_lacks_nothing_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = found(load(home=tmp_path, port=0), monkeypatch)
    assert {said[name].verdict for name in ("python", "packages", "port", "threads")} == {"ok"}
    assert not any(said[name].advice for name in ("python", "packages", "port", "threads"))
    assert (said["service"].verdict, said["service"].advice) == ("note", "start it with: polygraft up")


@pytest.mark.parametrize(("free", "verdict"), [(2 << 30, "ok"), ((2 << 30) - 1, "note")])
def test_a_disk_of_less_than_two_gibibytes_is_noted(
    free: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free)))
    disk = found(load(home=tmp_path, data=tmp_path / "not" / "yet", port=0), monkeypatch)["disk"]
    assert (disk.verdict, disk.found) == (verdict, f"2.0 GiB free at {tmp_path}")
    assert ("at least 2 GiB are wanted" in disk.advice) is (verdict == "note")


def test_a_port_that_somebody_has_is_bad_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = found(load(home=tmp_path, port=taken.getsockname()[1]), monkeypatch)["port"]
    assert port.verdict == "bad" and port.found and port.advice


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def _packages(_: Settings) -> Finding:
        raise RuntimeError("no")

    monkeypatch.setattr(checks, "_packages", _packages)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    said = found(load(home=tmp_path, port=0), monkeypatch)
    assert said["packages"] == Finding("packages", "bad", "RuntimeError: no")
    assert said["threads"].verdict == "note" and "whatever OMP_NUM_THREADS says" in said["threads"].advice
    assert said["python"].verdict == "ok"

"""Where settings come from, which wins, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.cluster.model import Limits
from polygraft.cluster.settings import BadSettings, load
from tests.k8s.pod import SERVICE_LINKS


def test_a_home_without_a_file_has_the_defaults(tmp_path: Path) -> None:
    settings = load(home=tmp_path, port=None)
    assert (settings.port, settings.backbone, settings.store_url) == (8000, "smollm2", "embedded")
    assert settings.data == tmp_path / "data"
    assert settings.pack.memory_bytes is None
    assert settings.pack_limits == Limits(max_rows=settings.pack.max_rows, unload_s=settings.unload_s)


def test_flags_win_over_the_environment_and_it_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("port: 1\nbackbone: file\nhost: 0.0.0.0\npack: {max_jobs: 3, idle_s: 5}\n")
    monkeypatch.setenv("POLYGRAFT_HOME", str(tmp_path))
    monkeypatch.setenv("POLYGRAFT_PORT", "2")
    monkeypatch.setenv("POLYGRAFT_BACKBONE", "env")
    monkeypatch.setenv("POLYGRAFT_PACK__MAX_JOBS", "4")
    settings = load(port=3)
    assert (settings.port, settings.backbone, settings.host) == (3, "env", "0.0.0.0")
    assert (settings.pack.max_jobs, settings.pack.idle_s) == (4, 5)


def test_a_home_given_by_flag_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("data: /elsewhere\n")
    monkeypatch.setenv("POLYGRAFT_HOME", "/nonexistent")
    assert load(home=tmp_path).data == Path("/elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prt: 1", "prt: unknown field (got 1); choices: api_key_file, backbone, data"),
        ("pack: {max_job: 1}", "pack.max_job: unknown field (got 1); choices: bytes, idle_s"),
        ("port: 99999", "port: Input should be less than or equal to 65535 (got 99999)"),
        ("store_url: mysql://x", "store_url: String should match"),
        ("pack: {micro_rows: 9999}", "pack: micro_rows 9999 is more than max_rows"),
        ("- 1", "expected field: value lines, found [1]"),
        ("port: [", "config.yaml: while parsing"),
    ],
)
def test_a_bad_file_names_the_field_and_the_value(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadSettings) as caught:
        load(home=tmp_path)
    assert message in str(caught.value)


def test_a_bad_variable_names_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAFT_PACK", "{not json")
    with pytest.raises(BadSettings, match=r"pack: the environment's '\{not json' is no JSON"):
        load(home=tmp_path)


def test_what_kubernetes_says_of_a_service_named_polygraft_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert load().port == 8000
    monkeypatch.setenv("POLYGRAFT_PORT", "tcp")
    with pytest.raises(BadSettings, match=r"port: .*'tcp'"):
        load()


def test_numbers_without_end_are_no_settings(tmp_path: Path) -> None:
    """JSON, in which the service is told them, has none."""
    (tmp_path / "config.yaml").write_text("serve: {wait_s: .inf}")
    with pytest.raises(BadSettings, match=r"serve\.wait_s: Input should be a finite number"):
        load(home=tmp_path)


@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/x"])
def test_a_path_that_cannot_be_is_refused_by_its_field(path: str, tmp_path: Path) -> None:
    for field in ("home", "data"):
        with pytest.raises(BadSettings, match=f"{field}: "):
            load(**{"home": tmp_path, field: Path(path)})


def test_what_the_environment_has_that_is_no_json_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAFT_GRAFT_ROOTS", "/a")
    with pytest.raises(BadSettings, match="graft_roots: the environment's '/a' is no JSON"):
        load(home=tmp_path)

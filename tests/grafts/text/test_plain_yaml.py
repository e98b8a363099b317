"""Every YAML file that is read takes numbers as YAML 1.2 and JSON write them, and says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polygraft.cluster.settings import load as load_settings
from polygraft.grafts.text.plain_yaml import YamlError, load, read_yaml
from polygraft.launch.commands.request import read_request
from polygraft.launch.commands.search_file import read_search_file

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "1.0e-4", "+1e-4", "10e-5", ".1e-3", "0.1E-3"])
def test_a_float_is_one_however_it_is_written(text: str) -> None:
    assert load(f"rate: {text}\n") == {"rate": 0.0001}


def test_other_values_are_pyyamls_but_for_dates() -> None:
    text = "{a: 3, b: -2.5, c: yes, d: null, e: lora(r=8), f: '1e-4', g: 2026-11-29, h: 1e, i: e-4, j: .inf, k: 1-4}"
    expected = {"a": 3, "b": -2.5, "c": True, "d": None, "e": "lora(r=8)", "f": "1e-4", "g": "2026-11-29", "h": "1e"}
    assert load(text) == expected | {"i": "e-4", "j": float("inf"), "k": "1-4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing a flow node"),
        ("a: 1\nb: 2\na: 3", "'a' is given twice"),
        ("p: {x: 1, x: 2}", "'x' is given twice"),
        ("[" * 2_000, "maximum recursion depth|while parsing"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_wrong_says_why(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        load(text)


def test_a_merged_mapping_may_be_given_again() -> None:
    text = "base: &b {x: 1}\none: {<<: *b, x: 2}"
    assert load(text) == {"base": {"x": 1}, "one": {"x": 2}}


def test_a_job_a_search_and_the_settings_take_an_exponent_without_a_dot(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    job, search = tmp_path / "job.yaml", tmp_path / "search.yaml"
    job.write_text("training_file: t.jsonl\npeft: lora(r=2)\nlearning_rate: 1e-4\n")
    assert read_request(job, {}).fields["learning_rate"] == 0.0001
    search.write_text(
        "name: s\ntraining_file: t.jsonl\nvalidation_file: t.jsonl\n"
        "space: {kind: autopeft, learning_rate: [1e-4, 1e-2]}\nhyperparameters: {weight_decay: 1e-2}\n"
    )
    wanted = read_search_file(search)
    assert (wanted.space.learning_rate, wanted.hyperparameters) == ((0.0001, 0.01), {"weight_decay": 0.01})
    (tmp_path / "config.yaml").write_text("pack: {idle_s: 1e2}\n")
    assert load_settings(home=tmp_path).pack.idle_s == 100.0


def test_nothing_reads_yaml_in_another_way() -> None:
    """Manifests are Kubernetes' YAML 1.1; they are read in tests alone."""
    folders = ("cluster", "grafts", "kernels", "launch", "serving", "trainers", "tuning", "benchmarks")
    importing = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) yaml\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"grafts/text/plain_yaml.py"}


def test_a_file_that_is_not_there_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(YamlError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(YamlError, match="can't decode"):
        read_yaml(tmp_path / "bytes.yaml")

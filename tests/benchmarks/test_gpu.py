"""The run for a GPU, dry: every part's code on the fake device, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
from gpu_findings import Findings
from measure import Goal

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def test_a_dry_run_goes_through_every_part_and_claims_nothing(tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--dry"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["dry"] and record["commit"] and record["versions"]["torch"]
    assert {name: part["state"] for name, part in record["parts"].items()} == {p.name: "done" for p in gpu.PARTS}
    assert not {name: part["failed"] for name, part in record["parts"].items() if part["failed"]}
    assert {claim["value"] for claim in record["claims"]} == {None}
    numbers = [fact for part in record["parts"].values() for fact in part["facts"].values() if fact is not None]
    assert not numbers


def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "no CUDA device: run this where torch sees a GPU, or with --dry for the code alone"
    ]
    assert not (tmp_path / "out").exists()


def test_the_parts_times_fit_into_eight_minutes() -> None:
    beside = max(part.seconds for part in gpu.PARTS if not part.timed)
    assert beside + sum(part.seconds for part in gpu.PARTS if part.timed) < 60 * gpu.MINUTES < 480


def test_a_part_that_dies_leaves_what_it_had_found_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that end at once stand for parts: without a GPU each refuses to start."""
    (tmp_path / "parts").mkdir()
    before = Findings(tmp_path / "parts/packed.json", 60.0, dry=False)
    before.claim("packed.alone.1", 2e-6, "rel-L2", "<", 1e-5)
    chosen = [part for part in gpu.PARTS if part.name in ("packed", "mixed")]
    monkeypatch.setattr(gpu, "_merged", lambda *given, **options: {})
    states = gpu._parts(chosen, tmp_path, tmp_path, 60.0)
    assert states == {"packed": "ended with 2", "mixed": "ended with 2"}
    assert json.loads((tmp_path / "parts/packed.json").read_text())["claims"][0]["holds"]


def test_an_item_that_raises_is_noted_and_one_without_time_is_left_out(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "part.json", 60.0, dry=False)

    def wrong() -> None:
        raise ValueError("not so")

    findings.each({"wrong": wrong, "right": lambda: findings.claim("right", 1.0, "times", ">=", 2.0)})
    findings.seconds = 0.0
    findings.each({"late": wrong})
    findings.ratios(Goal("speed", "speed", "ours", ("theirs",)), [{"ours": 3.0, "theirs": 2.0}])
    said = json.loads((tmp_path / "part.json").read_text())
    assert said["failed"] == {"wrong": "ValueError: not so"} and said["done"] == ["right"]
    assert list(said["left_out"]) == ["late"]
    assert [(claim["value"], claim["holds"]) for claim in said["claims"]] == [(1.0, False), (1.5, None)]

"""Hostile chat templates are refused or rendered soon, in little memory, and without running anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grafts.text.hostile_templates import KINDS, templates

ROOT = Path(__file__).parents[3]
SECONDS = 2.0
MEBIBYTES = 200


def judged(count: int, seed: int) -> None:
    """In a process of its own, whose memory and whose deeds are the templates'."""
    command = [sys.executable, "-m", "tests.grafts.text.hostile_templates", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *each, deeds = map(json.loads, done.stdout.splitlines())
    assert len(each) == count
    assert deeds == []
    slow = [one for one in each if one[3] > SECONDS]
    assert not slow, slow
    assert each[-1][4] < MEBIBYTES, [one for one in each if one[4] > MEBIBYTES]


def test_two_hostile_templates_of_each_kind_cost_little_and_run_nothing() -> None:
    judged(2 * len(KINDS), seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_and_twenty_hostile_templates_cost_little_and_run_nothing(seed: int) -> None:
    judged(120, seed)


def test_the_same_seed_draws_the_same_templates() -> None:
    assert templates(12, 3) == templates(12, 3) != templates(12, 4)

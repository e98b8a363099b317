"""The end of a benchmark that has figures and no arms: they are printed, written down, and judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import machine
from measure import Claim


def conclude(benchmark: str, claims: Sequence[Claim], *, quick: bool, json_path: Path | None) -> int:
    """The exit status: 1 where a claim does not hold."""
    for one in claims:
        goal = "" if one.goal is None else f"  goal {one.op} {one.goal:g}: {'holds' if one.holds else 'does not hold'}"
        print(f"{one.id:42} {one.value:10.3f} {one.unit}{goal}")
    if json_path:
        about = {"benchmark": benchmark, "quick": quick, "machine": asdict(machine.describe())}
        about |= {"versions": machine.versions(), "commit": machine.commit(), "claims": [asdict(one) for one in claims]}
        json_path.write_text(json.dumps(about, indent=1) + "\n")
    return int(any(one.holds is False for one in claims))

"""Where the time of a decoding step goes: sixteen streams on SmolLM2, bare and with eight LoRA grafts.

python benchmarks/decode_profile.py [--json PATH]

Times are the medians of one run and hold on this machine only; the counts of Python calls hold anywhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import machine
from assignment import Task
from material import GRAFT, GRAFTS, PROMPTS
from rich.console import Console
from rich.table import Table
from servers import Server

KINDS = {"bare": "engine_bare", f"{GRAFTS} grafts, {GRAFT}": "engine"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="decode_profile.py", description="One decoding step, taken apart.")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    given = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="polygraft-bench-") as folder:
        with closing(Server("material.py", Task("make", folder, machine.cores()))) as maker:
            maker.ask("make")
        for name, kind in KINDS.items():
            with closing(Server("decode_step.py", Task(kind, folder, machine.cores(), ours=True))) as server:
                found[name] = server.ask("profile")
    if given.json:
        head = {"machine": asdict(machine.describe()), "versions": machine.versions(), "commit": machine.commit()}
        given.json.write_text(json.dumps({**head, "streams": PROMPTS, "steps": found}, indent=1) + "\n")
    Console().print(_table(found))


def _table(found: dict[str, dict[str, object]]) -> Table:
    table = Table("", *found, title=f"A step of {PROMPTS} streams")
    table.add_row("ms", *(f"{step['ms']:.1f}" for step in found.values()))
    shares: list[dict[str, float]] = [step["ms_by_part"] for step in found.values()]  # type: ignore[misc]
    for part in dict.fromkeys(part for share in shares for part in share):
        table.add_row(f"  {part}", *(f"{share.get(part, 0.0):.2f}" for share in shares))
    table.add_row("calls from Python", *(f"{step['python_calls']:,}" for step in found.values()))
    return table


if __name__ == "__main__":
    main()

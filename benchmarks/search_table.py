"""The table of learning curves, and searches replayed on it.

python benchmarks/search_table.py make|replay|retrain|show [--work FOLDER] [--seconds S] [--only TEXT] [--seeds N]

`make` trains what the table lacks in packs, `replay` runs every sampler and pruner on it, `retrain` trains what the
studies with a pruner chose again on other seeds, `show` writes the report. Each goes on where it was left. The table,
the finals and the report are kept in benchmarks/peft_table; the work folder has the backbone, the table's shares and
the studies.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import kernels_elsewhere  # noqa: F401
import torch
from peft_table import finals, make, show, studies, table

_FINALS = table.HERE / "finals.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="search_table.py", description="A table of learning curves, and replays.")
    parser.add_argument("do", choices=("make", "replay", "retrain", "show"))
    parser.add_argument("--work", type=Path, default=Path("reports/peft_table"), help="what is made on the way")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--backwards", action="store_true", help="make the last shares first, beside another process")
    parser.add_argument("--only", default="", help="replay arms with this in their name (setting | task | arm)")
    parser.add_argument("--seeds", type=int, help="replay at most so many seeds of each arm")
    given = parser.parse_args()
    say = partial(print, flush=True)
    if given.do == "make":
        found = make.make(given.work, given.seconds, say, backwards=given.backwards)
        if found is None:
            return 1
        table.save(found)
        return 0
    rows = table.load()
    path = given.work / "studies.json"
    done: studies.Studies = json.loads(path.read_text()) if path.exists() else {}
    match given.do:
        case "replay":
            torch.set_num_threads(1)
            studies.measure(rows, path, seconds=given.seconds, only=given.only, seeds=given.seeds, say=say)
        case "retrain":
            finals.retrain(rows, done, given.work, _FINALS, say)
        case _:
            again: finals.Finals = json.loads(_FINALS.read_text()) if _FINALS.exists() else {}
            say(show.write(rows, done, again, table.HERE))
    return 0


if __name__ == "__main__":
    sys.exit(main())

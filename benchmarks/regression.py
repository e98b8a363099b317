"""Whether this tree is as fast as another commit: our own arms of the benchmarks, both trees in turn, in one run.

python benchmarks/regression.py --against COMMIT [--rounds N] [--cell NAME ...]

Exits with 1 where a cell's lower bound is below 0.97 of the other commit's speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import machine
from measure import interval
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trees import ROOT, git, worktree

CELLS = ("training", "serving", "serving.bare", "kernels.decode", "kernels.chunk")
LEAST = 0.97


class Cells:
    """The cells of one tree, each in processes of its own."""

    def __init__(self, tree: Path, folder: Path) -> None:
        paths = os.pathsep.join((str(tree / "benchmarks"), str(tree / ".types")))
        # -P: the script's own folder is this tree's, and must not come first
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(ROOT / "benchmarks/regression_cells.py"), str(folder)],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        self._hear()

    def speed(self, cell: str) -> float:
        """Tokens, or rows, a second of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{cell}\n")
        self._process.stdin.flush()
        return float(self._hear())

    def close(self) -> None:
        self._process.communicate()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("regression: a tree's cells ended; what they said is above")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cell", action="append", choices=CELLS, help="only these")
    given = parser.parse_args()
    before, after = measure(git("rev-parse", given.against), given.cell or CELLS, given.rounds)
    raise SystemExit(report(before, after, given.against))


def measure(commit: str, cells: tuple[str, ...], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Speeds of the commit and of this tree, one of either a round; who goes first alternates."""
    before: dict[str, list[float]] = {cell: [] for cell in cells}
    after: dict[str, list[float]] = {cell: [] for cell in cells}
    with ExitStack() as stack:
        sides = []
        for tree in (stack.enter_context(worktree(commit)), ROOT):
            side = Cells(tree, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(side.close)
            side.ready()
            sides.append(side)
        both = [(sides[0], before), (sides[1], after)]
        for number in track(range(rounds), "rounds", console=Console(stderr=True)):
            for cell in cells:
                for side, speeds in both if number % 2 else reversed(both):
                    speeds[cell].append(side.speed(cell))
    return before, after


def report(before: dict[str, list[float]], after: dict[str, list[float]], against: str) -> int:
    """Print both; 1 when a cell is slower than it may be."""
    table = Table(title=f"speed over that of {against}; {machine.describe().processor}", title_justify="left")
    for column in ("cell", against, "now", "ratio", "interval", "holds"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    slower = 0
    for cell in before:
        ratio = interval([new / old for old, new in zip(before[cell], after[cell], strict=True)])
        holds = ratio.low >= LEAST
        slower += not holds
        old, new = (interval(side[cell]).median for side in (before, after))
        table.add_row(
            cell,
            f"{old:.0f}",
            f"{new:.0f}",
            f"{ratio.median:.3f}",
            f"{ratio.low:.3f}-{ratio.high:.3f}",
            "yes" if holds else "no",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 1 if slower else 0


if __name__ == "__main__":
    main()

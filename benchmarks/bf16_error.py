"""Whether this tree's bf16 is as near to float32 as another commit's: SmolLM2's logits and the gradients of LoRAs, each
tree by its own code, beside transformers and PEFT in float32.

python benchmarks/bf16_error.py --against COMMIT

Exits with 1 where the median error of a cell is above the other commit's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import kernels_elsewhere  # noqa: F401
import machine
import torch
from measure import Interval, interval
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trees import ROOT, git, worktree

if TYPE_CHECKING:
    from material import Material

TEXTS = 8  # of each job; eight in all leave the sign of a twentieth to chance
EVERY = 4  # so-many-th of a text's tokens is compared, its last among them
PROMPT = 16  # tokens of a text that are a prompt, where the others follow one by one
TRUTH = "truth.safetensors"  # what float32 says, in the folder of a run

Errors = Mapping[str, Sequence[float]]  # of a cell, a text after the other


@dataclass(frozen=True, slots=True)
class Row:
    """A cell's medians, the commit's and this tree's, and the ratio of the two text by text."""

    cell: str
    before: float
    after: float
    ratio: Interval

    @property
    def holds(self) -> bool:
        return self.after <= self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, worktree(git("rev-parse", given.against)) as tree:
        theirs = _run("bf16_error_oracle.py", ROOT, Path(folder))  # first: it writes what the others read
        before, after = (_run("bf16_error_tree.py", side, Path(folder)) for side in (tree, ROOT))
    raise SystemExit(report(compare(before, after), theirs, given.against))


def compare(before: Errors, after: Errors) -> tuple[Row, ...]:
    assert before.keys() == after.keys()
    rows = []
    for cell, old in before.items():
        ratio = interval([b / a for a, b in zip(old, after[cell], strict=True)])
        rows.append(Row(cell, median(old), median(after[cell]), ratio))
    return tuple(rows)


def report(rows: Iterable[Row], theirs: Errors, against: str) -> int:
    """Print the medians; 1 when one is larger than it was. An interval around 1 says that chance may have decided."""
    table = Table(title=f"bf16's error against float32; {machine.describe().processor}", title_justify="left")
    for column in ("cell", against, "now", "text by text", "interval", "transformers", "holds"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    larger = 0
    for row in rows:
        larger += not row.holds
        medians = (f"{value:.4e}" for value in (row.before, row.after))
        ratio = f"{row.ratio.median:.4f}", f"{row.ratio.low:.4f}-{row.ratio.high:.4f}"
        table.add_row(row.cell, *medians, *ratio, f"{median(theirs[row.cell]):.4e}", "yes" if row.holds else "no")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 1 if larger else 0


def texts(material: Material) -> list[list[int]]:
    """The first of every job, then the second of every job and so on."""
    return [list(samples[number][:-1]) for number in range(TEXTS) for samples in material.samples]


def errors(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> Errors:
    """By cell, from tensors that are named cell/number: the norm of the difference over that of what is true, and the
    largest difference."""
    by_cell: dict[str, list[float]] = {}
    for name, value in found.items():
        cell, expected = name.partition("/")[0], true[name].double()
        apart = value.double() - expected
        by_cell.setdefault(f"{cell}, rel-L2", []).append(float(apart.norm() / expected.norm()))
        by_cell.setdefault(f"{cell}, largest", []).append(float(apart.abs().max()))
    return by_cell


def joined(gradients: Mapping[str, Tensor]) -> Tensor:
    """The tensors of a graft as one, in the order of their names."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def _run(script: str, tree: Path, folder: Path) -> Errors:
    """What a script finds with the tree's packages. Raises CalledProcessError."""
    out = folder / "errors.json"
    environment = os.environ | {
        "PYTHONPATH": str(tree / ".types"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [sys.executable, str(ROOT / "benchmarks" / script), str(tree), str(folder), str(out)]
    subprocess.run(words, env=environment, check=True)
    found: Errors = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    main()

"""Every Triton program compiled ahead of time for every card: registers, spills, shared memory, tensor-core
instructions, and the least time that the card's peaks allow its work.

python benchmarks/gpu_readiness.py

Compiled facts and a cost model: no GPU is used, and no time in the table is a measured one.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

from rich.console import Console
from rich.table import Table

from polygraft.kernels.affine.tuned import tuned as affine
from polygraft.kernels.branch.tuned import tuned as branch
from polygraft.kernels.common.aot import CARDS, Card, Tuned, compiled, roofline
from polygraft.kernels.kv.tuned import tuned as kv
from polygraft.kernels.nf4.tuned import tuned as nf4
from polygraft.kernels.norm.tuned import tuned as norm
from polygraft.kernels.rotate.tuned import tuned as rotate
from polygraft.kernels.sparse.tuned import tuned as sparse

OPS = {"branch": branch, "affine": affine, "norm": norm, "kv": kv, "nf4": nf4, "sparse": sparse, "rotate": rotate}
_WIDTH = 170
_MICRO = 1e6


def main() -> None:
    console = Console(width=_WIDTH)
    for card in CARDS:
        table = Table(title=f"sm_{card.arch}, {card.name} ({card.source})", title_justify="left")
        for column in ("op", "program", "registers", "spilled B", "shared B", "tensor cores", "work", "at least, us"):
            table.add_column(column, justify="left" if column in ("op", "program", "work", "tensor cores") else "right")
        for op, tuned in OPS.items():
            for each in tuned():
                table.add_row(op, each.name, *_facts(each, card), each.work, f"{_MICRO * roofline(each, card):.2f}")
        console.print(table)
    console.print("'at least' is cost.py's work over the card's stated peaks: a model, never a measured time.")


def _facts(tuned: Tuned, card: Card) -> tuple[str, ...]:
    facts = compiled(tuned, card.arch)
    cores = ", ".join(sorted(facts.tensor_core)) or ("none" if tuned.dot else "")
    return str(facts.registers), str(facts.spilled), f"{facts.shared} of {card.shared}", cores


if __name__ == "__main__":
    main()

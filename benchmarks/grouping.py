"""Does it pay to choose who shares a pack? Eight jobs, short and long, of low and high rank, in two packs: mixed,
apart by length, and apart by rank, each job as many optimiser steps.

grouping.py [--rounds N] [--json PATH]

tLoRA (arXiv 2602.07263) reports 1.2 to 1.8 times the throughput from grouping. A grouping's throughput is the tokens of
all jobs over the time of both packs together, as on devices that are never idle; its makespan that of the slower pack.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import machine
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pretrained import EMBEDDED, materialise
from polygraft.launch.cache import backbone_cache
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner

LENGTHS, RANKS, ALIKE = (16, 120), (4, 64), 2
BATCH, MAX_ROWS = 2, 768


@dataclass(frozen=True, slots=True)
class Kind:
    length: int
    rank: int


GROUPINGS: Mapping[str, Callable[[Kind, int], bool]] = {  # whether a job, the n-th of its kind, is in the first pack
    "mixed": lambda kind, n: n % 2 == 0,
    "by length": lambda kind, n: kind.length == LENGTHS[0],
    "by rank": lambda kind, n: kind.rank == RANKS[0],
}


def jobs(backbone: Backbone) -> list[tuple[Kind, int, TrainJob]]:
    made = []
    for kind in (Kind(*one) for one in product(LENGTHS, RANKS)):
        for number in range(ALIKE):
            graft = BoundGraft(parse(f"lora(r={kind.rank}, at=linear)"), backbone.shape)
            config = TrainConfig(epochs=100, batch_size=BATCH, learning_rate=1e-4, seed=number)
            ids = [[(7 * i + 13 * number + 101 * s) % 20_000 + 20 for i in range(kind.length)] for s in range(BATCH)]
            samples = tuple(Sample(tuple(one), (0.0,) + (1.0,) * (kind.length - 1)) for one in ids)
            made.append((kind, number, TrainJob(f"{kind.length}-{kind.rank}-{number}", graft, config, samples)))
    return made


def seconds(backbone: Backbone, members: Sequence[TrainJob], steps: int) -> float:
    """Until each job of the pack took `steps` optimiser steps, beyond a first one that is not timed."""
    runner = PackRunner(backbone, max_rows=MAX_ROWS)
    for job in members:
        runner.admit(job)
    for aim in (1, 1 + steps):
        begin = time.perf_counter()
        while any(running.step < aim for running in runner.jobs.values()):
            runner.step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(prog="grouping.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(machine.cores())
    backbone = Backbone.load(materialise(EMBEDDED, backbone_cache()), torch.bfloat16, training=True)
    everyone = jobs(backbone)
    tokens = given.steps * sum(sample.rows for _, _, job in everyone for sample in job.train)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in GROUPINGS}
    for _ in range(given.rounds):
        for name, first in GROUPINGS.items():
            packs = [[job for kind, n, job in everyone if first(kind, n) is side] for side in (True, False)]
            took[name].append((seconds(backbone, packs[0], given.steps), seconds(backbone, packs[1], given.steps)))
    found = {
        name: {
            "tokens_per_s": median(tokens / sum(one) for one in rounds),
            "makespan_s": median(max(one) for one in rounds),
            "over_mixed": median(sum(mixed) / sum(one) for mixed, one in zip(took["mixed"], rounds, strict=True)),
        }
        for name, rounds in took.items()
    }
    for name, figures in found.items():
        print(f"{name:10}", "  ".join(f"{what} {value:.2f}" for what, value in figures.items()))
    if given.json:
        head = {"machine": asdict(machine.describe()), "versions": machine.versions(), "commit": machine.commit()}
        given.json.write_text(json.dumps({**head, "tokens": tokens, "groupings": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

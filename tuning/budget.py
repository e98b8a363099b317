"""A plan from nothing but data and a budget: which space, sampler and pruner, and how many trials at which fidelity.

The rules are few and said aloud (`Chosen.why`): many trials at low fidelity are worth more than few at
full, so a trial sees at most EXAMPLES examples for one epoch; a small budget compares LoRA's ranks and rates, a middle
one AutoPEFT's space in a few groups of layers, a large one the whole registry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import JsonValue

EXAMPLES = 256  # of the training data that a trial sees
HELD_OUT = 64
SHARE = 0.15  # of the data held out, at least one example
SMALL, LARGE = 12, 60  # trials
SECONDS = 20.0  # a trial's, beside three others, of 256 examples of chat on two cores; only to turn minutes into trials
LONGEST = 256  # tokens kept of an example

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|trials?)", re.ASCII)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class BadBudget(ValueError):
    """A budget that cannot be read, or that is too small for a search."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The fields of a search request that a budget decides, and why, a sentence each."""

    options: dict[str, JsonValue]
    why: tuple[str, ...]


def trials_of(budget: str) -> int:
    """How many trials `20m`, `2h`, `90s` or `40 trials` are. Raises BadBudget."""
    found = _BUDGET.fullmatch(budget.strip())
    if found is None:
        raise BadBudget(f"budget: {budget!r} is not one; write 20m, 2h, 90s or 40 trials")
    amount, unit = float(found[1]), found[2]
    trials = int(amount if unit.startswith("trial") else amount * _SECONDS[unit] / SECONDS)
    if trials < 2:
        raise BadBudget(f"budget: {budget!r} is enough for {trials} trials of about {SECONDS:.0f} s; give more")
    return trials


def chosen(budget: str, examples: int) -> Chosen:
    """For training data of so many examples, without those held out. Raises BadBudget."""
    trials = trials_of(budget)
    used = min(examples, EXAMPLES)
    if trials < SMALL:
        space: dict[str, JsonValue] = {
            "kind": "union",
            "terms": [{"method": "lora", "search": {"r": [2, 4, 8, 16, 32], "at": []}}],
        }
        name, sampler = "LoRA's rank, sites and learning rate", "tpe"
    elif trials < LARGE:
        space = {"kind": "autopeft", "groups": 6, "largest": 128, "longest": 32}
        name, sampler = "AutoPEFT's, in 6 groups of layers", "tpe"
    else:
        space = {"kind": "which"}
        name, sampler = "the whole registry, each method with its own arguments", "tpe"
    pruner = "early-exit" if trials >= SMALL else "none"
    startup = max(2, min(10, trials // 3))
    options: dict[str, JsonValue] = {
        "trials": trials,
        "startup": startup,
        "space": space,
        "sampler": sampler,
        "pruner": pruner,
        "objectives": ["loss", "parameters"],
        "hyperparameters": {"n_epochs": 1, "batch_size": 8, "max_length": LONGEST},
    }
    exits = "those that fall behind exit early" if pruner != "none" else "each is trained to its end, as too few end"
    why = (
        f"{trials} trials" + ("" if "trial" in budget else f", as one takes about {SECONDS:.0f} s"),
        f"each sees {used} of {examples} examples once, at most {LONGEST} tokens of each",
        f"space: {name}",
        f"sampler: {sampler} after {startup} that are spread evenly; {exits}",
        "objectives: loss and trainable parameters",
    )
    return Chosen(options, why)

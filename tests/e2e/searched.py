"""What a tenant of the live service asks for: a classifier, a search for choice accuracy, and a population."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LABELS = ("fruit", "tool")
TEXTS = [("an apple", "fruit"), ("a knife", "tool"), ("a ripe pear", "fruit"), ("a spade", "tool"), ("a plum", "fruit")]
QUESTIONS = [
    ("What is a graft?", ("A shoot on a stock.", "A strip of cloth.", "A bird."), 0),
    ("When do you do it?", ("At noon.", "In late winter.", "Never."), 1),
    ("What gives the roots?", ("The fruit.", "The sap.", "The stock."), 2),
    ("What is cut aslant?", ("The shoot.", "The root.", "The leaf."), 0),
]
PAIRS = [("What is a graft?", "A shoot on a stock."), ("When do you do it?", "In late winter.")]
_LORA = {"kind": "union", "terms": [{"method": "lora", "search": {"r": [2, 4]}, "fixed": {"at": "attn.[qv]"}}]}
_TRAINED = {"n_epochs": 2, "batch_size": 2}


def write(folder: Path) -> None:
    """The files of all three, as their owner has them."""
    tsv = "".join(f"{text}\t{label}\n" for text, label in TEXTS)
    (folder / "texts.tsv").write_text(f"sentence\tlabel\n{tsv}")
    asked = [{"prompt": prompt, "choices": choices, "answer": answer} for prompt, choices, answer in QUESTIONS]
    said = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in PAIRS
    ]
    for name, lines in (("choices", asked), ("said", said)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan: dict[str, Any] = {"trials": 4, "concurrency": 4, "space": _LORA, "hyperparameters": _TRAINED}
    chosen = {"sampler": "lhs", "objectives": ["accuracy", "loss"], **_both("choices")}
    population = {"sampler": "pbt", "startup": 2, "objectives": ["loss"], **_both("said")}
    for name, more in (("choices", chosen), ("population", population)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **plan, **more}))


def _both(file: str) -> dict[str, str]:
    return {"training_file": f"{file}.jsonl", "validation_file": f"{file}.jsonl"}

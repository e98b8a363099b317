"""The table's tasks: answers to questions of chatterbot-corpus (BSD-3-Clause), split by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from polygraft.launch.corpus import Pair, topics
from polygraft.trainers.job import Sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TASKS: Mapping[str, tuple[str, ...]] = {
    "trivia": ("trivia",),
    "feelings": ("emotion", "psychology"),
    "machines": ("ai", "botprofile", "coding", "computers", "science", "tech_support"),
}
TABLED = ("trivia", "feelings")  # those of the table
OTHERS: tuple[str, ...] = ("conversations", "food", "gossip", "greetings", "health", "history", "humor", "literature")
OTHERS += ("money", "movies", "politics", "sports")
TRAINED = 96  # samples that are trained on, at most
HELD_OUT = 40  # pairs of the validation part, and of the test part, at least
LONGEST = 48  # tokens of a sample
STARTS, ENDS = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Split:
    """The pairs of a task; no question is in two parts."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def split(names: Sequence[str]) -> Split:
    """By the questions' hashes: always the same."""
    groups: dict[str, list[Pair]] = {}
    found = topics()
    for name in names:
        for pair in found[name]:
            groups.setdefault(pair.key, []).append(pair)
    train: list[Pair] = []
    validation: list[Pair] = []
    test: list[Pair] = []
    for key in sorted(groups, key=lambda key: sha256(key.encode()).digest()):
        part = test if len(test) < HELD_OUT else validation if len(validation) < HELD_OUT else train
        part.extend(groups[key])
    return Split(tuple(train), tuple(validation), tuple(test))


def dialogues() -> tuple[Pair, ...]:
    """What the backbone may have read: no topic of a task."""
    found = topics()
    return tuple(pair for name in OTHERS for pair in found[name])


def encoded(tokenizer: Tokenizer, pair: Pair) -> Sample:
    """Question and answer, of which the answer and its end are learnt; the first LONGEST tokens."""
    asked = tokenizer.encode(f"{STARTS}{pair.question}\n").ids
    answered = tokenizer.encode(f"{pair.answer}{ENDS}").ids
    ids = (*asked, *answered)
    weights = (0.0,) * len(asked) + (1.0,) * len(answered)
    return Sample(ids[:LONGEST], weights[:LONGEST])


def samples(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[Sample, ...]:
    """Without those whose question leaves no room for an answer."""
    found = (encoded(tokenizer, pair) for pair in pairs)
    return tuple(sample for sample in found if sample.weight)

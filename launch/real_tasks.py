"""Small real labelled sets for tests and benchmarks, from what registry packages ship.

Both are made of the English questions and answers of chatterbot-corpus 1.3.3 (BSD licence, Gunther Cox and
contributors): which of its topics a question is of (labelled texts), and which of four answers belongs to it (a choice
set; the three others are answers to questions of the same topic). A question is in one split alone, whatever its
answers; splits and wrong answers hang on hashes of the questions, so that they are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from polygraft.launch.corpus import Pair, topics

LICENCE = "chatterbot-corpus 1.3.3, BSD"
LEAST = 20  # questions that a topic has, to be a label
SHARES = (("train", 0.6), ("validation", 0.2), ("test", 0.2))


@dataclass(frozen=True, slots=True)
class Task:
    """A task's examples, as JSONL; nothing of one part is in another."""

    name: str
    train: bytes
    validation: bytes
    test: bytes

    @property
    def parts(self) -> Mapping[str, bytes]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def topic_of_a_question(most: int = 100) -> Task:
    """At most `most` questions of each topic, of at least LEAST. Raises CorpusError where the corpus is missing."""
    records = [
        (pair.key, {"sentence": pair.question, "label": topic})
        for topic, pairs in _large(most).items()
        for pair in pairs
    ]
    return _task("topic of a question", records)


def answer_to_a_question(most: int = 100) -> Task:
    """The same questions, each with its answer and three to others of its topic. Raises CorpusError."""
    records = []
    for pairs in _large(most).values():
        answers = sorted({pair.answer for pair in pairs}, key=_hash)
        for pair in pairs:
            wrong = sorted((one for one in answers if one != pair.answer), key=lambda one: _hash(pair.key + one))[:3]
            place = int(_hash(pair.key), 16) % (len(wrong) + 1)
            choices = [*wrong[:place], pair.answer, *wrong[place:]]
            records.append((pair.key, {"prompt": pair.question, "choices": choices, "answer": place}))
    return _task("answer to a question", records)


def _large(most: int) -> Mapping[str, Sequence[Pair]]:
    """Of each topic one pair a question, where there are enough."""
    found = {}
    for topic, pairs in topics().items():
        firsts = {pair.key: pair for pair in reversed(pairs)}
        if len(firsts) >= LEAST:
            found[topic] = sorted(firsts.values(), key=lambda pair: _hash(pair.key))[:most]
    return found


def _task(name: str, records: Iterable[tuple[str, object]]) -> Task:
    parts: dict[str, list[str]] = {part: [] for part, _ in SHARES}
    for key, record in sorted(records, key=lambda one: _hash(one[0])):
        parts[_part(key)].append(json.dumps(record, ensure_ascii=False) + "\n")
    return Task(name, **{part: "".join(lines).encode() for part, lines in parts.items()})


def _part(key: str) -> str:
    at = int(_hash(f"split {key}"), 16) / 16**64
    for part, share in SHARES:
        at -= share
        if at < 0:
            return part
    return SHARES[-1][0]


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()

"""What a study takes over from earlier ones: the best configurations of those over the same space, nearest tasks first.

AutoPEFT's configurations transfer between tasks (Zhou et al. 2024, arXiv 2301.12132, section 5: what was found on RTE
does well on all of GLUE). How near tasks are is told from statistics of their data alone: how many examples there are,
how long prompts and answers are, how many answers differ, and which words occur.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, log, sqrt
from pathlib import Path
from zlib import crc32

from pydantic import JsonValue

from polygraft.tuning.spaces.parameters import Config

EXAMPLES = 2000  # read of a file
WORDS = 64  # classes into which words are hashed
CONFIGURATIONS = 4  # taken over at most


@dataclass(frozen=True, slots=True)
class Task:
    """Statistics of a training file: examples, mean characters of prompt and answer, the share of answers that differ,
    and the relative frequency of each class of words."""

    examples: int
    prompt: float
    answer: float
    distinct: float
    words: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Configurations to be tried first, and the studies that they are of."""

    configs: tuple[Config, ...] = ()
    studies: tuple[str, ...] = ()


def task_of(path: Path) -> Task:
    """Of a file with a JSON object a line, or tab-separated fields: the last text in it is the answer, what stands
    before it the prompt."""
    examples, prompt, answer = 0, 0, 0
    counts, answers = [0] * WORDS, set[str]()
    with path.open() as lines:
        for line in islice((one for one in lines if one.strip()), EXAMPLES):
            *before, last = _fields(line)
            examples, answer = examples + 1, answer + len(last)
            prompt += sum(map(len, before))
            answers.add(last)
            for text in (*before, last):
                for word in text.lower().split():
                    counts[crc32(word.encode()) % WORDS] += 1
    words, many = sum(counts) or 1, examples or 1
    shares = tuple(count / words for count in counts)
    return Task(examples, prompt / many, answer / many, len(answers) / many, shares)


def similarity(one: Task, other: Task) -> float:
    """From 0 to 1, the mean of five: the cosine of word frequencies, how near the three sizes are by their logarithms,
    and how near the shares of answers that differ."""
    sizes = ((one.examples, other.examples), (one.prompt, other.prompt), (one.answer, other.answer))
    near = [exp(-abs(log(1 + a) - log(1 + b))) for a, b in sizes]
    lengths = sqrt(sum(a * a for a in one.words)) * sqrt(sum(b * b for b in other.words))
    cosine = sum(a * b for a, b in zip(one.words, other.words, strict=True)) / lengths if lengths else 0.0
    return (cosine + sum(near) + 1 - abs(one.distinct - other.distinct)) / 5


def taken_over(
    task: Task | None, earlier: Mapping[str, tuple[Task | None, Sequence[Config]]], most: int = CONFIGURATIONS
) -> WarmStart:
    """Of earlier studies, each with its task and its configurations from the best on, the best of each, then the second
    best of each, the nearest task first; those without statistics come last."""

    def far(study: str) -> tuple[float, str]:
        own = earlier[study][0]
        return (1.0 if task is None or own is None else -similarity(task, own), study)

    order = sorted(earlier, key=far)
    depth = max((len(configs) for _, configs in earlier.values()), default=0)
    found: list[Config] = []
    studies: list[str] = []
    for place in range(depth):
        for study in order:
            configs = earlier[study][1]
            if place < len(configs) and configs[place] not in found and len(found) < most:
                found.append(dict(configs[place]))
                studies.append(study)
    return WarmStart(tuple(found), tuple(dict.fromkeys(studies)))


def _fields(line: str) -> list[str]:
    try:
        return list(_texts(json.loads(line))) or [""]
    except ValueError:
        return line.rstrip("\n").split("\t")


def _texts(value: JsonValue) -> Iterator[str]:
    inner: Iterable[JsonValue] = ()
    match value:
        case str():
            yield value
        case dict():
            inner = (one for name, one in value.items() if name != "role")
        case list():
            inner = value
    for one in inner:
        yield from _texts(one)

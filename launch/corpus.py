"""The demo's data: English question-answer pairs of the package chatterbot-corpus, as chat JSONL for eight tenants.

Of tech_support's 1,050 pairs only 10 differ, and of coding's 184 only 98, most of them long programs; so tenants are
made of whole small topics too, and every pair is used once. A question is never in two places, not even with other
answers: what a tenant holds out it cannot have seen, and no tenant can profit from another's data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from polygraft.grafts.text.plain_yaml import read_yaml


class CorpusError(RuntimeError):
    """The demo's corpus is not installed."""


@dataclass(frozen=True, slots=True)
class Pair:
    question: str
    answer: str

    @property
    def key(self) -> str:
        """The question without case, spaces and punctuation: two pairs of one key are never on two sides of a split."""
        return re.sub(r"\W+", " ", self.question.casefold()).strip()

    @property
    def characters(self) -> int:
        return len(self.question) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Share:
    """One tenant's data, or the search's."""

    name: str
    topics: tuple[str, ...]
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def train_jsonl(self) -> bytes:
        return jsonl(self.train)

    @property
    def held_out_jsonl(self) -> bytes:
        return jsonl(self.held_out)


@dataclass(frozen=True, slots=True)
class Corpus:
    tenants: tuple[Share, ...]
    search: Share


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Whose topics go where; a large topic goes in equal `parts` to several owners."""

    name: str
    topics: tuple[str, ...]
    part: int = 0
    parts: int = 1


_TENANTS = (
    _Recipe("computing", ("tech_support", "computers", "coding", "science")),
    _Recipe("trivia-1", ("trivia",), 0, 2),
    _Recipe("trivia-2", ("trivia",), 1, 2),
    _Recipe("ai", ("ai", "botprofile")),
    _Recipe("emotion", ("emotion",), 0, 2),
    _Recipe("conversations", ("conversations", "greetings")),
    _Recipe("psychology", ("psychology", "gossip", "health", "money")),
    _Recipe("culture", ("literature", "movies", "sports", "food", "humor")),
)
_SEARCH = _Recipe("emotion-search", ("emotion",), 1, 2)


def load(*, most: int = 110, held_out: int = 20, characters: int = 200) -> Corpus:
    """Eight tenants and the search's share; the same arguments always give the same corpus.

    A share has at most `most` pairs, the shortest of its topics, none longer than `characters` (question and answer);
    at least `held_out` of them are held out. Raises CorpusError if chatterbot-corpus is not installed.
    """
    topics = sorted({topic for recipe in (*_TENANTS, _SEARCH) for topic in recipe.topics})
    taken: set[str] = set()  # questions that an earlier topic has
    pairs = {topic: _unique(_pairs(_folder() / f"{topic}.yml", topic), characters, taken) for topic in topics}
    shares = [_share(recipe, pairs, most, held_out) for recipe in (*_TENANTS, _SEARCH)]
    return Corpus(tuple(shares[:-1]), shares[-1])


def topics(*, characters: int = 200) -> Mapping[str, Sequence[Pair]]:
    """The distinct pairs of every topic, none longer than `characters`; a question is in one topic alone, the first by
    name. Raises CorpusError."""
    taken: set[str] = set()
    files = sorted(_folder().glob("*.yml"))
    return {path.stem: _unique(_pairs(path, path.stem), characters, taken) for path in files}


def jsonl(pairs: Iterable[Pair]) -> bytes:
    """OpenAI's chat fine-tuning format, one example a line."""
    lines = []
    for pair in pairs:
        turns = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _folder() -> Path:
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError("the demo needs the package chatterbot-corpus; run `pip install 'polygraft[embedded]'`")
    return Path(spec.submodule_search_locations[0]) / "data" / "english"


def _pairs(path: Path, topic: str) -> Iterator[Pair]:
    """A list in the file is a dialogue in `conversations`; elsewhere it is a question and its alternative answers."""
    content = read_yaml(path)
    assert isinstance(content, dict)
    for entry in content["conversations"]:
        if not isinstance(entry, list):  # one line of trivia is a string by a slip of the file's
            continue
        turns = [str(turn).strip() for turn in entry]
        both = pairwise(turns) if topic == "conversations" else ((turns[0], answer) for answer in turns[1:])
        yield from (Pair(question, answer) for question, answer in both)


def _unique(pairs: Iterable[Pair], characters: int, taken: set[str]) -> list[Pair]:
    kept = dict.fromkeys(
        pair for pair in pairs if pair.key and pair.answer and pair.characters <= characters and pair.key not in taken
    )
    taken.update(pair.key for pair in kept)
    return list(kept)


def _share(recipe: _Recipe, pairs: dict[str, list[Pair]], most: int, held_out: int) -> Share:
    whole = [pair for topic in recipe.topics for pair in pairs[topic]]
    groups = _dealt(_groups(whole), recipe.parts)[recipe.part]
    dealt = [pair for group in groups for pair in group]
    mine = sorted(dealt, key=lambda pair: (pair.characters, pair.question, pair.answer))[:most]
    out: list[Pair] = []
    train: list[Pair] = []
    for group in _groups(mine):
        (out if len(out) < held_out else train).extend(group)
    return Share(recipe.name, recipe.topics, tuple(train), tuple(out))


def _groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs of one question together, the groups in an order that looks random but only depends on the questions."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.key, []).append(pair)
    return [groups[key] for key in sorted(groups, key=lambda key: sha256(key.encode()).digest())]


def _dealt(groups: list[list[Pair]], parts: int) -> list[list[list[Pair]]]:
    """Each group to the part that has the fewest pairs so far, the first of them on a tie."""
    hands: list[list[list[Pair]]] = [[] for _ in range(parts)]
    for group in groups:
        min(hands, key=lambda hand: sum(map(len, hand))).append(group)
    return hands

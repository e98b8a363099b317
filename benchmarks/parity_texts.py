"""The grafts that parity is measured with, as they were written when the comparison began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
_QUICK = ("lora", "dora", "ia3", "prefix", "bitfit", "serial", "parallel", "prompt", "shira", "oft", "loha", "vera")
_QUICK_ARCHITECTURES = ("gpt2", "gemma2")


@dataclass(frozen=True)
class Texts:
    """Texts by name, by what they are for; `members` are those of the grafts that a method over others is given."""

    groups: Mapping[str, Mapping[str, str]]
    members: Mapping[str, str]
    quick: bool

    @staticmethod
    def read(*, quick: bool) -> Texts:
        raw: Mapping[str, Mapping[str, str | list[str]]] = json.loads(FILE.read_text())
        groups = {
            group: {name: text if isinstance(text, str) else text[0] for name, text in texts.items()}
            for group, texts in raw.items()
        }
        members = {text[0]: text[1] for texts in raw.values() for text in texts.values() if isinstance(text, list)}
        return Texts(groups, members, quick)

    def of(self, group: str) -> Mapping[str, str]:
        """A group's texts; of a quick run's, some."""
        texts = self.groups[group]
        if not self.quick:
            return texts
        if group == "methods":
            return {name: text for place, (name, text) in enumerate(texts.items()) if name in _QUICK or place % 4 == 0}
        return {name: text for place, (name, text) in enumerate(texts.items()) if place % 2 == 0}

    def some(self, every: int) -> Mapping[str, str]:
        """Every so-many-th of the methods, and those of a quick run."""
        texts = self.of("methods")
        if self.quick:
            return dict(list(texts.items())[:12])
        return {name: text for place, (name, text) in enumerate(texts.items()) if name in _QUICK or place % every == 0}

    def architectures(self, all: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(arch for arch in all if not self.quick or arch in _QUICK_ARCHITECTURES)

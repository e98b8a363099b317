"""The step logs as proof: how many jobs a training step packed, and how many grafts and methods a decoding step
mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class Packing:
    """Over the logged steps of all packs."""

    packs: int
    steps: int
    median_jobs: float
    most_jobs: int
    median_rows: float


@dataclass(frozen=True, slots=True)
class Mixing:
    """Over the logged decoding steps of all replicas; the best step is the one with the most methods, then grafts."""

    replicas: int
    steps: int
    most_grafts: int
    methods_then: int
    mixed_steps: int


def packing(data: Path, jobs: frozenset[str]) -> Packing:
    """Of the steps in which one of `jobs` took part."""
    logs = {
        path: [line for line in _lines(path) if jobs & _names(line, "jobs")]
        for path in data.glob("packs/*/steps.jsonl")
    }
    lines = [line for found in logs.values() for line in found]
    sizes = [len(_names(line, "jobs")) for line in lines]
    rows = [int(str(line["rows"])) for line in lines]
    return Packing(
        sum(map(bool, logs.values())), len(lines), median(sizes or [0]), max(sizes, default=0), median(rows or [0])
    )


def mixing(data: Path, since: float, *, grafts: int, methods: int) -> Mixing:
    """Of the decoding steps after `since`; a mixed step has at least `grafts` grafts of at least `methods` methods."""
    found = data.glob("replicas/*/steps.jsonl")
    logs = {path: [line for line in _lines(path) if _decodes(line, since)] for path in found}
    widths = [(len(_names(line, "grafts")), len(_names(line, "methods"))) for lines in logs.values() for line in lines]
    best = max(widths, key=lambda width: (min(width[1], methods), width[0]), default=(0, 0))
    mixed = sum(width >= grafts and kinds >= methods for width, kinds in widths)
    return Mixing(sum(map(bool, logs.values())), len(widths), *best, mixed)


def _decodes(line: Mapping[str, JsonValue], since: float) -> bool:
    return float(str(line["time"])) >= since and not line["prefill_rows"]


def _lines(path: Path) -> Iterator[Mapping[str, JsonValue]]:
    """The whole lines; a last one without an end was being written when the process died."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _names(line: Mapping[str, JsonValue], field: str) -> frozenset[str]:
    """The bare backbone is no graft; the log has null for it."""
    value = line[field]
    assert isinstance(value, list)
    return frozenset(str(name) for name in value if name)

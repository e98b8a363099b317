"""The record of a run: what was planned, what is measured so far, and its JSON file, from which a run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import Machine
from measure import Claim

from polygraft.kernels.common.atomic import write_text


@dataclass(frozen=True, slots=True)
class Head:
    """What a run is: samples of two runs may stand together only if all of it is equal."""

    benchmark: str
    quick: bool
    rounds: int
    shapes: Mapping[str, int | str]
    about: Mapping[str, str]
    machine: Machine
    versions: Mapping[str, str]
    commit: str
    sources: str


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of the correctness gate: `value` is right up to `limit` (down to it, where `least`)."""

    what: str
    value: float
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Gate:
    """The correctness gate; green when there are checks and all hold (a NaN never does)."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(check.holds for check in self.checks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """An arm alone on the machine: the variant to time and how fast each was, PSS when idle and at its highest; or why
    there is none of it."""

    dtype: str = ""
    variant: str = ""
    probes: Mapping[str, float] = field(default_factory=dict)
    idle_bytes: int = 0
    peak_bytes: int = 0
    missing: str | None = None


@dataclass(slots=True)
class Record:
    """All facts of a run. `samples` holds a mapping of arm to figure for every round, the last maybe not whole."""

    head: Head
    path: Path | None = None
    gate: Gate | None = None
    arms: dict[str, Outcome] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    figures: list[Claim] = field(default_factory=list)

    @staticmethod
    def resume(head: Head, path: Path | None) -> Record:
        """What `path` holds if it is of the same head, else an empty record; claims are always decided anew."""
        record = Record(head, path)
        if path is None or not path.exists():
            return record
        try:
            data = json.loads(path.read_text())
            if {name: data.get(name) for name in asdict(head)} != json.loads(json.dumps(asdict(head))):
                return record
            if data["gate"]:
                record.gate = Gate(tuple(Check(**check) for check in data["gate"]["checks"]))
            record.arms = {name: Outcome(**arm) for name, arm in data["arms"].items()}
            record.samples = data["samples"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not the record of a benchmark ({error}); move it away") from None
        return record

    def save(self) -> None:
        """Write it whole, under its name or not at all."""
        if self.path is None:
            return
        gate = self.gate and {"holds": self.gate.holds, **asdict(self.gate)}
        data = {
            **asdict(self.head),
            "gate": gate,
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
            "samples": self.samples,
            "figures": [asdict(figure) for figure in self.figures],
            "claims": [asdict(claim) for claim in self.claims],
        }
        write_text(self.path, json.dumps(data, indent=1) + "\n")

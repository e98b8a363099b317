"""What a part of the GPU run finds, written down as it is found, so that a part that dies leaves what it had."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure import Claim, Goal, Op, decide

Fact = float | int | str | bool | None | Sequence["Fact"] | Mapping[str, "Fact"]


@dataclass
class Findings:
    """Facts by name, claims, and items that failed or were left out; the file at `path` always holds all of them.

    `seconds` is the part's time: `left` says what remains of it, and items begin only while some does. In a dry run
    values are not kept, since the device has none.
    """

    path: Path
    seconds: float
    dry: bool
    facts: dict[str, Fact] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def fact(self, name: str, value: Fact) -> None:
        self.facts[name] = None if self.dry else value
        self.save()

    def claim(self, id: str, value: float, unit: str, op: Op | None = None, goal: float | None = None) -> None:
        """A number, and whether it is at most (below) or at least the goal; NaN never is."""
        if self.dry:
            self.claims.append(Claim(id, None, unit, goal, op, None))
        else:
            holds = None if op is None or goal is None else value >= goal if op == ">=" else value < goal
            self.claims.append(Claim(id, value, unit, goal, op, holds))
        self.save()

    def ratios(self, goal: Goal, samples: Sequence[Mapping[str, float]]) -> None:
        """The ratio of an arm to its rivals over the rounds, with its interval."""
        self.claims.append(decide(goal, [] if self.dry else samples))
        self.save()

    def leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.save()

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """An error inside is noted, and the part goes on."""
        try:
            yield
            self.done.append(name)
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"[:600]
            self.facts[f"{name}: where"] = traceback.format_exc().splitlines()[-8:]
        self.save()

    def each(self, items: Mapping[str, Callable[[], None]]) -> None:
        """The items in order, while there is time."""
        for name, do in items.items():
            if self.left <= 0:
                self.leave_out(name, f"the part's {self.seconds:.0f} s were over")
                continue
            with self.item(name):
                do()

    def save(self) -> None:
        said = {
            "seconds": round(time.monotonic() - self.began, 1),
            "done": self.done,
            "failed": self.failed,
            "left_out": self.left_out,
            "facts": self.facts,
            "claims": [asdict(claim) for claim in self.claims],
        }
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.write_text(json.dumps(said, indent=1) + "\n")
        draft.replace(self.path)

"""What a search may minimise and limit: measured by a trial, or known from its graft before it runs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

from polygraft.cluster.scores import SCORES
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import decode_bytes
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape

_STORED = 4  # bytes of a number in a graft's file
_SERVED = 2  # in a cache and beside it


class BadObjective(ValueError):
    """An objective or limit that there is not; the message names the field, the value and the choices."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Something to minimise. `log`: the sampler is to look at its logarithm, as for counts that span decades. `known`:
    it follows from the graft alone. Of a `score` it is what is missing to 1."""

    name: str
    log: bool = False
    known: bool = False
    score: bool = False

    def shown(self, value: float) -> str:
        """A value as people know it."""
        return f"{1 - value if self.score else value:g} {self.name}"


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so much of an objective, of a score of what is missing to 1 (`limit`)."""

    name: str
    most: float


LOSS = Objective("loss")
PARAMETERS = Objective("parameters", log=True, known=True)
BYTES = Objective("bytes", log=True, known=True)
DECODE_BYTES = Objective("decode_bytes", known=True)

# `loss`: of a weighted token of the held-out examples, after training. `parameters`: trained ones. `bytes`: of the
# graft's file. `decode_bytes`: moved for every decoded token beside the backbone's (`grafts/cost.py:decode_bytes`).
# The scores are those of the held-out examples (`cluster/scores.py`).
OBJECTIVES: Mapping[str, Objective] = {
    one.name: one for one in (LOSS, PARAMETERS, BYTES, DECODE_BYTES, *(Objective(name, score=True) for name in SCORES))
}


def objective(name: str) -> Objective:
    """Raises BadObjective that lists the choices."""
    if name not in OBJECTIVES:
        raise BadObjective(f"objectives: {name!r} is unknown; choices: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def limit(name: str, value: float) -> Limit:
    """What a user who writes `value` means: the most of an objective, the least of a score."""
    return Limit(name, 1 - value if name in OBJECTIVES and OBJECTIVES[name].score else value)


def check(objectives: tuple[str, ...], limits: tuple[Limit, ...]) -> None:
    """Raises BadObjective for unknown or repeated names, and limits that cannot be told."""
    if not objectives:
        raise BadObjective(f"objectives: none; choices: {', '.join(OBJECTIVES)}")
    for names, field in ((objectives, "objectives"), (tuple(limit.name for limit in limits), "limits")):
        for name in names:
            if name not in OBJECTIVES:
                raise BadObjective(f"{field}: {name!r} is unknown; choices: {', '.join(OBJECTIVES)}")
            if names.count(name) > 1:
                raise BadObjective(f"{field}: {name!r} is given twice")
    if all(OBJECTIVES[name].known for name in objectives):
        raise BadObjective("objectives: nothing of them is measured, so no trial is needed; add loss")
    for limit in limits:
        if not isfinite(limit.most):
            raise BadObjective(f"limits.{limit.name}: {limit.most} is not a number to stay below")
        if OBJECTIVES[limit.name].score and not 0 <= limit.most <= 1:
            raise BadObjective(f"limits.{limit.name}: {1 - limit.most:g} is no score; give the least, from 0 to 1")
        if not OBJECTIVES[limit.name].known and limit.name not in objectives:
            raise BadObjective(f"limits.{limit.name}: it is measured; give it as an objective, too")


@lru_cache(maxsize=4096)
def known(name: str, peft: str, shape: ModelShape) -> float:
    """The value of a known objective for a union on a backbone. Raises SpecError."""
    graft = BoundGraft(parse(peft), shape)
    match name:
        case "parameters":
            return float(graft.parameters)
        case "bytes":
            return float(_STORED * (graft.parameters + graft.frozen))
        case "decode_bytes":
            return float(decode_bytes(graft, _SERVED))
        case _:
            raise BadObjective(f"objectives: {name!r} is not known before a trial")

"""Spaces of grafts as data: methods with arguments to be tried, groups of layers, learning rates; and what a point of a
space means.

The arguments and their ranges are those that the methods declare (`grafts/methods/ranges.py`). A size's top value means
that its method is off (AutoPEFT, Zhou et al. 2024, arXiv 2301.12132). The names of a configuration's values are those
of `parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import learning_rate as rate_of
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.ranges import Value
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.spaces.parameters import (
    Choice,
    Config,
    InvalidConfig,
    LogUniform,
    Parameter,
    When,
    Whole,
    check,
)

Group = tuple[int, int]  # layers, first and last

LEARNING_RATE = "learning_rate"
_RATE_SPAN = 10**0.5  # half a decade to each side of the methods' own rates


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a configuration means: a union as text, its learning rate, its trainable parameters on the backbone."""

    peft: str
    learning_rate: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates from `low` to `high`; `relative` ones are factors on the rate that the union's methods declare."""

    low: float
    high: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise SpecError(f"learning_rate: {self.low} to {self.high} is not a range of positive numbers")

    @property
    def parameter(self) -> LogUniform:
        return LogUniform(LEARNING_RATE, self.low, self.high)

    def of(self, value: float, peft: str) -> float:
        """With two digits: what a person would write, and near copies of a configuration become equal to it."""
        return float(f"{value * rate_of(parse(peft)) if self.relative else value:.1e}")


@dataclass(frozen=True, slots=True)
class Searched:
    """An argument of a method and the values to try, in this order; of unordered ones none is near another."""

    argument: str
    values: tuple[Value, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Term:
    """A member of the union: a method, arguments that are searched and others that are `fixed`, in the given layers or
    those of the space's mask. It may be `off`, and is nothing where its condition `when` does not hold. `name` starts
    the names of its parameters."""

    name: str
    method: str
    searched: tuple[Searched, ...] = ()
    fixed: tuple[tuple[str, str], ...] = ()
    layers: Group | None = None
    off: bool = False
    when: When | None = None

    @property
    def parameters(self) -> Iterator[Parameter]:
        if self._one is not None:
            yield Whole(self.name, 0, len(self._one.values) - (not self.off), self.when)
            return
        when = self.when
        if self.off:
            yield Whole(f"{self.name}.on", 0, 1, when)
            when = (f"{self.name}.on", (1,))
        for one in self.searched:
            name = f"{self.name}.{one.argument}"
            yield Whole(name, 0, len(one.values) - 1, when) if one.ordered else Choice(name, len(one.values), when)

    def text(self, config: Config) -> str | None:
        """As a user would write it, without its layers; None when it is off."""
        if self.when is not None and config.get(self.when[0]) not in self.when[1]:
            return None
        if self._one is not None:
            index = int(config[self.name])
            return None if index == len(self._one.values) else self.written({self._one.argument: index})
        if self.off and not config[f"{self.name}.on"]:
            return None
        return self.written({one.argument: int(config[f"{self.name}.{one.argument}"]) for one in self.searched})

    def written(self, chosen: Mapping[str, int]) -> str:
        """With the values of these numbers."""
        values = [(one.argument, f"{one.values[chosen[one.argument]]}") for one in self.searched]
        arguments = [*values, *self.fixed]
        first = next(iter(find(self.method).arguments), None)
        said = [value if i == 0 and name == first else f"{name}={value}" for i, (name, value) in enumerate(arguments)]
        return f"{self.method}({', '.join(said)})" if said else self.method

    @property
    def _one(self) -> Searched | None:
        """The argument, where there is one alone and in order: its parameter is the term's."""
        return self.searched[0] if len(self.searched) == 1 and self.searched[0].ordered else None


@dataclass(frozen=True, slots=True)
class Space:
    """Unions of terms, those without layers of their own in the groups of layers that a mask leaves in; no groups: in
    all. `switches` are what conditions ask about. A graft has at most `most` trainable parameters."""

    shape: ModelShape
    terms: tuple[Term, ...]
    learning_rate: Rates
    groups: tuple[Group, ...] = ()
    switches: tuple[Choice | Whole, ...] = ()
    most: int | None = None
    kind: Literal["union"] = "union"

    def __post_init__(self) -> None:
        if not self.terms:
            raise SpecError("terms: a space without methods has no grafts; give at least one")
        names = [parameter.name for parameter in self.parameters]
        if len(names) > len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise SpecError(f"terms: two parameters are called {twice}; give the terms other names")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            *self.switches,
            *(parameter for term in self.terms for parameter in term.parameters),
            *(Whole(mask_name(group), 0, 1) for group in self.groups),
            self.learning_rate.parameter,
        )

    def candidate(self, config: Config) -> Candidate:
        """The graft at a point. Raises InvalidConfig when every method is off, every layer out, it has too many
        parameters, or it is no point."""
        check(self.parameters, config)
        said = [(text, term.layers) for term in self.terms if (text := term.text(config)) is not None]
        if not said:
            raise InvalidConfig("every method is off")
        mask = [group for group in self.groups if config[mask_name(group)]]
        if self.groups and not mask:
            raise InvalidConfig("every layer is left out")
        everywhere = len(mask) == len(self.groups)
        places: dict[str, list[Group]] = {}
        for text, layers in said:
            places.setdefault(text, []).extend([layers] if layers else [] if everywhere else mask)
        peft = " + ".join(f"{text}{_at(groups, self.shape)}" for text, groups in places.items())
        return candidate(peft, config[LEARNING_RATE], self.learning_rate, self.shape, self.most)


def candidate(peft: str, rate: float, rates: Rates, shape: ModelShape, most: int | None) -> Candidate:
    """A union as a candidate. Raises InvalidConfig for one that means nothing on the backbone or is too large."""
    try:
        parameters = count(peft, shape)
    except SpecError as error:
        raise InvalidConfig(str(error)) from None
    if most is not None and parameters > most:
        raise InvalidConfig(f"parameters: {parameters} are more than {most}")
    return Candidate(peft, rates.of(rate, peft), parameters)


@lru_cache(maxsize=4096)
def count(peft: str, shape: ModelShape) -> int:
    """Trainable parameters of a union. Raises SpecError."""
    return BoundGraft(parse(peft), shape).parameters


def rates(methods: Iterable[str]) -> Rates:
    """Half a decade to each side of the rates that the registry gives for these methods."""
    own = [find(method).learning_rate for method in methods]
    return Rates(min(own) / _RATE_SPAN, max(own) * _RATE_SPAN)


RELATIVE = Rates(1 / _RATE_SPAN, _RATE_SPAN, relative=True)


def evenly(layers: int, groups: int) -> tuple[Group, ...]:
    """Layers in groups of as even a size as can be. Raises SpecError for more groups than layers."""
    if not 1 <= groups <= layers:
        raise SpecError(f"groups: {groups} is not between 1 and the backbone's {layers} layers")
    edges = [index * layers // groups for index in range(groups + 1)]
    return tuple((first, after - 1) for first, after in pairwise(edges))


def mask_name(group: Group) -> str:
    return f"layers_{group[0]}_{group[1]}"


def layer_text(groups: Sequence[Group]) -> str:
    """`0-9,20-29`: neighbours are joined."""
    joined: list[Group] = []
    for first, last in groups:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in joined)


def _at(groups: Sequence[Group], shape: ModelShape) -> str:
    text = layer_text(sorted(groups))
    return "" if text in ("", layer_text([(0, shape.layers - 1)])) else f"@{text}"

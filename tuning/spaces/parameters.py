"""The axes of a space: names, ranges, and which of them a configuration has.

A configuration has a value for every parameter that is there in it: one with a condition is there when the parameter
that it names, which stands before it, has one of the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Literal

Config = Mapping[str, int | float]
When = tuple[str, tuple[int, ...]]  # (a parameter, its values)


class InvalidConfig(ValueError):
    """A configuration that means no graft, or is not one of the space; the message says why."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number between `low` and `high`, both included; near numbers mean near things."""

    name: str
    low: int
    high: int
    when: When | None = None
    kind: Literal["whole"] = "whole"

    def at(self, share: float) -> int:
        return self.low + min(int(share * (self.high - self.low + 1)), self.high - self.low)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `count` things by its number, from 0; none is nearer to another than the rest."""

    name: str
    count: int
    when: When | None = None
    kind: Literal["choice"] = "choice"

    @property
    def low(self) -> int:
        return 0

    @property
    def high(self) -> int:
        return self.count - 1

    def at(self, share: float) -> int:
        return min(int(share * self.count), self.count - 1)


@dataclass(frozen=True, slots=True)
class Uniform:
    """A number between `low` and `high`."""

    name: str
    low: float
    high: float
    when: When | None = None
    kind: Literal["uniform"] = "uniform"

    def at(self, share: float) -> float:
        return min(self.high, self.low + share * (self.high - self.low))


@dataclass(frozen=True, slots=True)
class LogUniform:
    """A positive number between `low` and `high`, spread evenly over its logarithm."""

    name: str
    low: float
    high: float
    when: When | None = None
    kind: Literal["log"] = "log"

    def at(self, share: float) -> float:
        value = exp(log(self.low) + share * (log(self.high) - log(self.low)))
        return min(self.high, max(self.low, value))


# `at(share)` of each is the value below which this share, in [0, 1), of its range lies.
Parameter = Whole | Choice | Uniform | LogUniform


def is_there(parameter: Parameter, config: Config) -> bool:
    """Whether a configuration has the parameter, given the values of those before it."""
    if parameter.when is None:
        return True
    name, values = parameter.when
    return name in config and config[name] in values


def projected(parameters: Sequence[Parameter], values: Config) -> Config:
    """Of a value for every parameter those that are there."""
    kept: dict[str, int | float] = {}
    for parameter in parameters:
        if is_there(parameter, kept):
            kept[parameter.name] = values[parameter.name]
    return kept


def filled(parameters: Sequence[Parameter], config: Config) -> Config:
    """The inverse, for a model that wants a value for every parameter: what is not there is in the middle."""
    return {p.name: config[p.name] if p.name in config else p.at(0.5) for p in parameters}


def check(parameters: Sequence[Parameter], config: Config) -> None:
    """Raises InvalidConfig for what is not a point."""
    there: list[Parameter] = []
    for parameter in parameters:
        if is_there(parameter, config):
            there.append(parameter)
    if config.keys() != {parameter.name for parameter in there}:
        raise InvalidConfig(f"expected {', '.join(p.name for p in there)}; found {', '.join(sorted(config))}")
    for parameter in there:
        value = config[parameter.name]
        whole = isinstance(parameter, Whole | Choice)
        fits = parameter.low <= value <= parameter.high  # False for NaN
        if not fits or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise InvalidConfig(f"{parameter.name}: {value} is not {kind} between {parameter.low} and {parameter.high}")


def at_shares(parameters: Sequence[Parameter], shares: Iterable[float]) -> Config:
    """The configuration at these shares, one a parameter, of the parameters' ranges."""
    return projected(parameters, {p.name: p.at(share) for p, share in zip(parameters, shares, strict=True)})

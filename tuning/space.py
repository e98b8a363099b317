"""Spaces of grafts as data: sizes of methods, groups of layers, learning rates; and what a point of a space means.

A space is flat: every parameter is there in every configuration, and a size's top value means that its method is off
(AutoPEFT, Zhou et al. 2024, arXiv 2301.12132), so that one Gaussian process can model it. The names of a
configuration's values are those of `parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError

Config = Mapping[str, int | float]

LEARNING_RATE = "learning_rate"
MOST_BITS = 24  # deeper backbones are masked in groups of layers
_RATE_SPAN = 10**0.5  # half a decade to each side of the methods' own rates


class InvalidConfig(ValueError):
    """A configuration that means no graft, or is not one of the space; the message says why."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number between `low` and `high`, both included."""

    name: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class LogUniform:
    """A positive number between `low` and `high`, spread evenly over its logarithm."""

    name: str
    low: float
    high: float


Parameter = Whole | LogUniform


@dataclass(frozen=True, slots=True)
class Sized:
    """A method whose first argument is searched: `largest` halved k times, k = 0, 1, ... until it is 1; then off."""

    method: str
    largest: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size at every k; 0 is off."""
        return (*(self.largest >> k for k in range(self.largest.bit_length())), 0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a configuration means: a union as text, its learning rate, its trainable parameters on the backbone."""

    peft: str
    learning_rate: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Space:
    """Methods with sizes, in the groups of layers (first, last) that a mask leaves in; no groups: in all layers."""

    shape: ModelShape
    methods: tuple[Sized, ...]
    groups: tuple[tuple[int, int], ...]
    learning_rate: tuple[float, float]

    def __post_init__(self) -> None:
        if not self.methods:
            raise SpecError("methods: a space without methods has no grafts; give at least one")
        for sized in self.methods:
            find(sized.method)
            if sized.largest < 1:
                raise SpecError(f"largest: {sized.largest} is not a size of {sized.method}; give at least 1")
        low, high = self.learning_rate
        if not 0 < low < high:
            raise SpecError(f"learning_rate: {low} to {high} is not a range of positive numbers")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            *(Whole(sized.method, 0, len(sized.sizes) - 1) for sized in self.methods),
            *(Whole(_mask_name(group), 0, 1) for group in self.groups),
            LogUniform(LEARNING_RATE, *self.learning_rate),
        )

    def candidate(self, config: Config) -> Candidate:
        """The graft at a point. Raises InvalidConfig when every method is off, every layer out, or it is no point."""
        self._check(config)
        sizes = [(sized.method, sized.sizes[int(config[sized.method])]) for sized in self.methods]
        terms = [f"{method}({size})" for method, size in sizes if size]
        if not terms:
            raise InvalidConfig("every method is off")
        layers = [group for group in self.groups if config[_mask_name(group)]]
        if self.groups and not layers:
            raise InvalidConfig("every layer is left out")
        at = "" if len(layers) == len(self.groups) else f"@{_layer_text(layers)}"
        peft = " + ".join(f"{term}{at}" for term in terms)
        # Two digits: what a person would write, and near copies of a configuration become equal to it.
        return Candidate(peft, float(f"{config[LEARNING_RATE]:.1e}"), BoundGraft(parse(peft), self.shape).parameters)

    def _check(self, config: Config) -> None:
        if config.keys() != {parameter.name for parameter in self.parameters}:
            raise InvalidConfig(
                f"expected {', '.join(p.name for p in self.parameters)}; found {', '.join(sorted(config))}"
            )
        for parameter in self.parameters:
            value = config[parameter.name]
            kind = "a number" if isinstance(parameter, LogUniform) else "a whole number"
            fits = parameter.low <= value <= parameter.high  # False for NaN
            if not fits or (isinstance(parameter, Whole) and value != int(value)):
                raise InvalidConfig(
                    f"{parameter.name}: {value} is not {kind} between {parameter.low} and {parameter.high}"
                )


def autopeft(
    shape: ModelShape,
    *,
    groups: int | None = None,
    largest: int | None = None,
    longest: int | None = None,
    learning_rate: tuple[float, float] | None = None,
) -> Space:
    """AutoPEFT's space and a learning rate: serial x parallel x prefix sizes x one mask of layers that all three share.

    As published: sizes are the hidden size halved again and again, down to 1 and off, and each layer has its bit.
    `largest` and `longest` cap the adapters and the prefix instead; `groups` is the number of bits, at most one a layer
    (default: one each, up to MOST_BITS).
    """
    bits = min(shape.layers, MOST_BITS) if groups is None else groups
    if not 1 <= bits <= shape.layers:
        raise SpecError(f"groups: {bits} is not between 1 and the backbone's {shape.layers} layers")
    adapter = shape.hidden if largest is None else largest
    prefix = shape.hidden if longest is None else longest
    methods = (Sized("serial", adapter), Sized("parallel", adapter), Sized("prefix", prefix))
    edges = [index * shape.layers // bits for index in range(bits + 1)]
    ranges = tuple((first, after - 1) for first, after in pairwise(edges))
    return Space(shape, methods, ranges, learning_rate or rates(sized.method for sized in methods))


def rates(methods: Iterable[str]) -> tuple[float, float]:
    """Half a decade to each side of the rates that the registry gives for these methods."""
    own = [find(method).learning_rate for method in methods]
    return min(own) / _RATE_SPAN, max(own) * _RATE_SPAN


def _mask_name(group: tuple[int, int]) -> str:
    return f"layers_{group[0]}_{group[1]}"


def _layer_text(groups: Sequence[tuple[int, int]]) -> str:
    """`0-9,20-29`: neighbours are joined."""
    joined: list[tuple[int, int]] = []
    for first, last in groups:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in joined)

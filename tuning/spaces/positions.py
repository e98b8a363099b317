"""S3PET's space (Hu et al. 2022, arXiv 2206.07382): at which positions of the backbone small modules stand, under a
budget.

The paper learns a gate for every position by gradients, shifted so that the expected number of parameters is the
budget. Here a position has a score, and positions are taken from the highest score down while they fit: every graft is
within the budget by construction, and any sampler can search.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import (
    LEARNING_RATE,
    Candidate,
    Group,
    Rates,
    candidate,
    count,
    evenly,
    layer_text,
    rates,
)
from polygraft.tuning.spaces.parameters import Config, InvalidConfig, Parameter, Uniform, check

# The paper's mixed set: LoRA and biases at projections, adapters after sublayers, layer norms.
_PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
LORA = tuple(f"lora(r=1, at={site})" for site in _PROJECTIONS)
MIXED = (
    *LORA,
    *(f"bitfit(at={site})" for site in _PROJECTIONS),
    *(f"serial(1, at={site})" for site in ("attn.out", "ffn.out")),
    *(f"ln-tuning(at={site})" for site in ("norm.1", "norm.2")),
)
DEFAULT_GROUPS = 6


@dataclass(frozen=True)
class PositionSpace:
    """A position is one of `modules`, as text, in one of `groups` of layers; a graft has at most `most` trainable
    parameters."""

    shape: ModelShape
    modules: tuple[str, ...]
    groups: tuple[Group, ...]
    most: int
    learning_rate: Rates
    kind: Literal["positions"] = "positions"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*(Uniform(name, 0.0, 1.0) for name in self.costs), self.learning_rate.parameter)

    @cached_property
    def costs(self) -> dict[str, int]:
        """Trainable parameters of every position, by its text."""
        texts = [f"{module}@{layer_text([group])}" for group in self.groups for module in self.modules]
        return {text: count(text, self.shape) for text in texts}

    def candidate(self, config: Config) -> Candidate:
        """The graft at a point. Raises InvalidConfig for no point of the space."""
        check(self.parameters, config)
        left, taken = self.most, set[str]()
        for position, cost in sorted(self.costs.items(), key=lambda pair: (-config[pair[0]], pair[0])):
            if cost <= left:
                left -= cost
                taken.add(position)
        terms = []
        for module in self.modules:
            groups = [group for group in self.groups if f"{module}@{layer_text([group])}" in taken]
            if groups:
                terms.append(f"{module}@{layer_text(groups)}")
        if not terms:
            raise InvalidConfig(f"parameters: no position has at most {self.most}")
        return candidate(" + ".join(terms), config[LEARNING_RATE], self.learning_rate, self.shape, self.most)


def positions(
    shape: ModelShape,
    *,
    most: int,
    mixed: bool = True,
    groups: int | None = None,
    learning_rate: Rates | None = None,
) -> PositionSpace:
    """The `mixed` set of the paper (S3PET-M), or LoRA alone (S3PET-L), in groups of layers. Raises SpecError for a
    budget below the smallest position."""
    modules = tuple(module for module in (MIXED if mixed else LORA) if _stands(module, shape))
    parts = evenly(shape.layers, min(shape.layers, DEFAULT_GROUPS) if groups is None else groups)
    methods = ("lora", "bitfit", "serial", "ln-tuning") if mixed else ("lora",)
    space = PositionSpace(shape, modules, parts, most, learning_rate or rates(methods))
    smallest = min(space.costs.values())
    if smallest > most:
        raise SpecError(f"most: no position has at most {most} trainable parameters; the smallest has {smallest}")
    return space


def _stands(module: str, shape: ModelShape) -> bool:
    try:
        return count(module, shape) > 0
    except SpecError:
        return False

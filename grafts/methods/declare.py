"""What a method's file declares: the method itself, and the forms, starting values and hooks that only it needs.

Torch-free: the functions of a declaration get tensors and may import torch inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polygraft.grafts.methods.ranges import Range, plain, range_of
from polygraft.grafts.methods.refused import NAMED_TWICE
from polygraft.grafts.spec import DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Build = Callable[..., tuple[Slot, ...]]
_LARGEST_INTEGER = 2**31 - 1  # more than a model has of anything
_LARGEST_NUMBER = 3.4028234e38  # that float32 holds
RunFromLayer = Callable[["Tensor", int], Mapping[int, tuple["Tensor", "Tensor"]]]


@dataclass(frozen=True, slots=True)
class Method:
    """A PEFT method: how its arguments become slots, where it was published, and the learning rate to start a search
    from. `hooks` come with it, made from the same arguments. `slots` says in its docstring what the method is
    (`description.py`). A `quantised` one means something on a quantised backbone alone."""

    name: str
    paper: str
    learning_rate: float
    slots: Build
    aliases: tuple[str, ...] = ()
    hooks: Callable[..., tuple[DeclRef, ...]] | None = None
    quantised: bool = False

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """By name, with their plain types."""
        return {name: one.replace(annotation=plain(one.annotation)) for name, one in self._declared.items()}

    @property
    def searched(self) -> Mapping[str, Range]:
        """The arguments that a search may try other values of, in their order."""
        ranges = {name: range_of(one.annotation) for name, one in self._declared.items()}
        return {name: one for name, one in ranges.items() if one is not None}

    @property
    def _declared(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.slots, eval_str=True).parameters

    def positional(self, index: int) -> str:
        """Name of the argument at `index`; raises SpecError past the last. Some are given by name alone (`of`)."""
        names = [name for name, one in self.arguments.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        if index >= len(names):
            raise SpecError(f"peft: {self.name} takes at most {len(names)} arguments: {', '.join(names)}")
        return names[index]

    def build(self, arguments: Mapping[str, str]) -> tuple[tuple[Slot, ...], tuple[DeclRef, ...]]:
        """Slots and hooks for textual arguments; raises SpecError for an unknown name or a value of the wrong type."""
        values = self.values(arguments)
        return self.slots(**values), self.hooks(**values) if self.hooks else ()

    def values(self, arguments: Mapping[str, str]) -> dict[str, object]:
        """Textual arguments by their types; raises SpecError as `build` does."""
        known = self.arguments
        values: dict[str, object] = {}
        for key, text in arguments.items():
            if key not in known:
                twice = f" ({self.name} is {NAMED_TWICE[self.name]})" if self.name in NAMED_TWICE else ""
                choices = ", ".join(known) or "none"
                raise SpecError(f"peft: {self.name} has no argument {key!r}; choices: {choices}{twice}")
            values[key] = _convert(f"{self.name}.{key}", text, known[key].annotation)
        return values


@dataclass(frozen=True, slots=True)
class SiteShape:
    """A site as a form sees it: widths of its input and output, and its number among the slot's sites."""

    layer: int
    name: str
    d_in: int
    d_out: int
    index: int = 0


@dataclass(frozen=True, slots=True)
class TensorDecl:
    """Shape and start of one tensor; `start` names a starting value of `grafts/init.py` or of a method's file."""

    shape: tuple[int, ...]
    start: str | DeclRef = "zero"
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Lowering:
    """What the operands of a form may depend on beside its tensors.

    `weight` gives the frozen W [out, in] of the site, or of another in its layer by name, float32 or wider.
    `run_from_layer` runs rows [p, hidden] that enter before a layer (its number) through the frozen layers from there
    on, by themselves and at positions 0 to p - 1: the keys and values that they leave, by layer, once for all sites.
    `draw` is a number of the job's optimiser step, hashed with its seed, for forms that are redrawn each step; None
    when the graft is served or evaluated.
    """

    place: SiteShape
    weight: Callable[..., Tensor]
    run_from_layer: RunFromLayer
    draw: int | None = None


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """A matrix of small integers: W[o, g, i] = scale[o, g] q[o, g, i] + offset[o, g], for the inputs i of group g.

    q [out, groups, inputs of a group] are whole numbers, 2^bits values of a row's group at most; scale and offset are
    [out, groups]. All have the dtype that the weights are wanted in.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor
    bits: int

    def weight(self) -> Tensor:
        """W [out, in]."""
        return (self.scale.unsqueeze(-1) * self.q + self.offset.unsqueeze(-1)).flatten(1)


def _nothing(*_: object, **__: object) -> Mapping[str, TensorDecl]:
    return {}


@dataclass(frozen=True, slots=True)
class Parametrization:
    """A reparametrisation: a slot's operands as a function of other tensors.

    `own` gives the tensors of a site, `shared` those that all sites of the slot have in common (from all its places).
    `operands` maps their values, by part, to the op's operands (A [rank, in] and B [rank, out] of a branch, "W" [out,
    in] of a delta, ...): pure and differentiable, in the values' dtype. One that runs rows through the frozen layers
    (`runs_layers`) needs a decoder, whose rows see none but those before them. `grid`, of a delta whose W + dW lies on
    a grid of integers, gives them from the same arguments, so that nothing is rounded when it is merged.

    Parts in `kept` are operands as they are, so that a frozen one asks for no gradient and for none of what that takes
    of a forward. `absent` says at which layers no row of the graft passes its op at a draw (None when it is served,
    where such sites have no tensors either); they then cost nothing. Files of grafts may call it what it was
    called `formerly`.
    """

    name: str
    operands: Callable[..., Mapping[str, Tensor]]  # (slot, values, lowering, **arguments)
    own: Callable[..., Mapping[str, TensorDecl]] = _nothing  # (slot, place, **arguments)
    shared: Callable[..., Mapping[str, TensorDecl]] = _nothing  # (slot, places, **arguments)
    runs_layers: bool = False
    grid: Callable[..., IntegerGrid] | None = None
    kept: tuple[str, ...] = ()
    absent: Callable[..., bool] | None = None  # (layer, draw, **arguments)
    formerly: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Starting values by name: `make(tensor, making, **arguments)` returns the tensor's value.

    `check(tensor, graft, sources, **arguments)` raises SpecError where the grafts that it starts from, by name, do
    not give it; without tensors, so that a request can be refused.
    """

    name: str
    make: Callable[..., Tensor]
    check: Callable[..., None] | None = None


@dataclass(frozen=True, slots=True)
class Hook:
    """What a method does to its own tensors in training; every function may be left out.

    `penalty(values, **arguments)` is a scalar added to the loss of every global batch, a differentiable function of the
    trained tensors by name. `gradient(values, gradients, **arguments)` changes the collected gradients in place.
    `after_step(values, gradients, step, total, **arguments)` changes tensors, frozen ones too, in place after an
    optimiser step. `rate(tensor, **arguments)` is a factor on the learning rate of a tensor. `anew(total, **arguments)`
    is the step, of `total`, at which the job's optimiser and its schedule start anew. `forward_only` says that the
    gradient is estimated from forward passes at a distance `eps` (`trainers/mezo.py`), `resized` that each step
    computes with a subnet of the graft (`grafts/elastic.py`). Files of grafts may call it what it was called
    `formerly`.
    """

    name: str
    penalty: Callable[..., Tensor] | None = None
    gradient: Callable[..., None] | None = None
    after_step: Callable[..., None] | None = None
    rate: Callable[..., float] | None = None
    anew: Callable[..., int] | None = None
    forward_only: bool = False
    resized: bool = False
    formerly: str | None = None


def _convert(field: str, text: str, kind: object) -> object:
    if kind is not int and kind is not float:
        return text
    given, name = f"peft: {field}: {text[:60]!r}", "an integer" if kind is int else "a number"
    try:
        value: int | float = int(text) if kind is int else float(text)
    except ValueError:
        raise SpecError(f"{given} is not {name}") from None
    most = _LARGEST_INTEGER if kind is int else _LARGEST_NUMBER
    if value != value:
        raise SpecError(f"{given} is not {name}")
    if abs(value) > most:
        raise SpecError(f"{given} is out of bounds; give {name} up to {most}")
    return value

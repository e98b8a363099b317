"""Spaces as users ask for them: `{kind: autopeft, groups: 6}`, on the backbone of the service.

Every kind takes `learning_rate: [lowest, highest]`, factors on the methods' own rates with `relative_rates`, and
`most`, the largest number of trainable parameters; without them it has what its builder says.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from polygraft.grafts.methods.ranges import Value
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import Group, Rates, Searched, Space, Term, evenly, rates
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.feasible import checked, declared
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.positions import positions
from polygraft.tuning.spaces.s4 import SHARE, s4_space
from polygraft.tuning.spaces.supernets import NLS_RANKS, NOAH_DEPTHS, NOAH_SIZES, lora_ranks, nls, noah
from polygraft.tuning.spaces.which import refusal, which

Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    learning_rate: tuple[PositiveFloat, PositiveFloat] | None = None
    relative_rates: bool = False
    most: PositiveInt | None = None

    @model_validator(mode="after")
    def _ascending(self) -> _Asked:
        _ = self.rates
        return self

    @property
    def rates(self) -> Rates | None:
        return None if self.learning_rate is None else Rates(*self.learning_rate, relative=self.relative_rates)


class AutoPeftSpace(_Asked):
    """Serial and parallel adapter, prefix, one mask of layers."""

    kind: Literal["autopeft"] = "autopeft"
    groups: PositiveInt | None = None
    largest: PositiveInt | None = None
    longest: PositiveInt | None = None

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        caps = {"groups": self.groups, "largest": self.largest, "longest": self.longest}
        return autopeft(shape, **caps, learning_rate=self.rates, most=self.most)


class S4Request(_Asked):
    """Groups of layers, what each may spend, and its methods, within `most` (default: 0.5% of the layers' weights)."""

    kind: Literal["s4"]

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        return s4_space(shape, most=self.most or int(SHARE * weights(shape)), learning_rate=self.rates)


class NoahSpace(_Asked):
    """LoRA, adapter and prefix, each up to a depth and of a size there."""

    kind: Literal["noah"]
    sizes: Sizes = NOAH_SIZES
    depths: PositiveInt = NOAH_DEPTHS

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        return noah(shape, sizes=self.sizes, depths=self.depths, learning_rate=self.rates, most=self.most)


class NlsSpace(_Asked):
    """LoRA's rank, one in every group of layers."""

    kind: Literal["nls"]
    ranks: Sizes = NLS_RANKS
    groups: PositiveInt | None = None
    at: str = "linear"

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        rate = self.rates
        return nls(shape, ranks=self.ranks, groups=self.groups, at=self.at, learning_rate=rate, most=self.most)


class LoraRanksSpace(_Asked):
    """LoRA's rank at every kind of projection."""

    kind: Literal["lora_ranks"]
    largest: PositiveInt = 32
    groups: PositiveInt = 1

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        return lora_ranks(shape, largest=self.largest, groups=self.groups, learning_rate=self.rates, most=self.most)


class PositionsRequest(_Asked):
    """Where small modules stand, within `most` (default: 0.1% of the layers' weights); LoRA alone unless `mixed`."""

    kind: Literal["positions"]
    mixed: bool = True
    groups: PositiveInt | None = None

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        most = self.most or weights(shape) // 1000
        return positions(shape, most=most, mixed=self.mixed, groups=self.groups, learning_rate=self.rates)


class WhichSpace(_Asked):
    """One method of the registry, with its own arguments."""

    kind: Literal["which"]
    only: tuple[str, ...] = ()
    family: str | None = None
    merges: bool = False

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        filters = {"only": self.only, "family": self.family, "merges": self.merges, "quantised": quantised}
        given = {"learning_rate": self.rates} if self.rates else {}
        return which(shape, **filters, **given, most=self.most)  # type: ignore[arg-type]


class TermRequest(BaseModel):
    """A member of a union: a method, the arguments to search (all that it declares when not given; an empty list of
    values: those that it declares), others that are `fixed`, its layers, and whether it may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    name: str | None = None
    search: dict[str, tuple[Value, ...]] | None = None
    fixed: dict[str, Value] = {}
    layers: Group | None = None
    off: bool = False

    def term(self, shape: ModelShape, *, quantised: bool) -> Term:
        method = find(self.method)
        known, given = method.arguments, (*(self.search or ()), *self.fixed)
        for argument in given:
            if argument not in known:
                choices = ", ".join(known) or "none"
                raise SpecError(f"terms: {self.method} has no argument {argument!r}; choices: {choices}")
            if given.count(argument) > 1:
                raise SpecError(f"terms: {argument} of {self.method} is searched and fixed; leave one of them out")
        if reason := refusal(method, quantised=quantised, given=given):
            raise SpecError(f"space: {self.method} {reason}")
        only = None if self.search is None else tuple(name for name, values in self.search.items() if not values)
        own = {one.argument: one for one in declared(self.method, shape, only=only)}
        for name, values in (self.search or {}).items():
            if values:
                own[name] = Searched(name, values, ordered=all(not isinstance(value, str) for value in values))
            elif name not in own:
                raise SpecError(f"terms: {self.method} declares no values of {name}; give some")
        searched = tuple(own[name] for name in known if name in own and name not in self.fixed)
        fixed = tuple((name, f"{value}") for name, value in self.fixed.items())
        return Term(self.name or self.method, self.method, searched, fixed, self.layers, self.off)


class UnionSpace(_Asked):
    """Any union of methods, in the layers of one mask of so many groups, if there are."""

    kind: Literal["union"]
    terms: Annotated[tuple[TermRequest, ...], Field(min_length=1)]
    groups: PositiveInt | None = None

    def space(self, shape: ModelShape, *, quantised: bool = False) -> AnySpace:
        terms = tuple(term.term(shape, quantised=quantised) for term in self.terms)
        mask = () if self.groups is None else evenly(shape.layers, self.groups)
        return checked(Space(shape, terms, self.rates or rates(term.method for term in terms), mask, most=self.most))


SpaceRequest = Annotated[
    AutoPeftSpace | S4Request | NoahSpace | NlsSpace | LoraRanksSpace | PositionsRequest | WhichSpace | UnionSpace,
    Field(discriminator="kind"),
]


def weights(shape: ModelShape) -> int:
    """Elements of the matrices of the backbone's layers, which budgets are shares of."""
    names = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
    return shape.layers * sum(d_in * d_out for d_in, d_out in map(shape.dims, names))

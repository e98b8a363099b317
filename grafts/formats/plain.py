"""A graft as one of the plainest method that computes just the same: branches that are linear as one LoRA a site, rows
before the input or the keys and values as the rows themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import Term, union
from polygraft.grafts.lowering import Lowered
from polygraft.grafts.sites import LINEAR, ModelShape, Site, gathered
from polygraft.grafts.spec import KV, Branch, Layers, Tokens

Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """What a LoRA is at one site."""

    r: int
    alpha: float
    dropout: float = 0.0

    def term(self, names: tuple[str, ...], layers: Layers) -> Term:
        said = {"r": str(self.r), "alpha": str(self.alpha), "at": "|".join(names), "dropout": str(self.dropout)}
        return Term("lora", said, layers)


def plain(graft: BoundGraft, values: Values | None) -> tuple[BoundGraft, Values | None] | None:
    """The graft as a LoRA, prompt or prefix, exact but for rounding; None for one that is none of these. Without
    `values` only what it would be."""
    match graft.spec.slots:
        case (Tokens(mode="before", gate="none", length=length),):
            simpler = union([Term("prompt", {"length": str(length)})])
        case (KV(aside=False, layers=None, length=length),):
            simpler = union([Term("prefix", {"length": str(length)})])
        case _:
            return _lora(graft, values)
    if not _weightless(graft):
        return None
    return BoundGraft(simpler, graft.shape), None if values is None else _operands(graft, values)


def loras(ranks: Mapping[Site, Rank], shape: ModelShape) -> BoundGraft:
    """LoRAs at just these sites, in as few terms as there are different ranks and sets of layers."""
    terms = [rank.term(names, layers) for rank, names, layers in gathered(sorted(ranks.items()), shape)]
    return BoundGraft(union(terms), shape)


def _lora(graft: BoundGraft, values: Values | None) -> tuple[BoundGraft, Values | None] | None:
    branches: dict[Site, list[tuple[int, Branch]]] = {}
    for index, site in graft.sites:
        slot = graft.spec.slots[index]
        if not (isinstance(slot, Branch) and slot.act == "identity" and slot.tap == "input" and site.name in LINEAR):
            return None
        if slot.bias or slot.gate != "none":
            return None
        branches.setdefault(site, []).append((index, slot))
    if not _weightless(graft):
        return None
    ranks = {site: _rank([slot for _, slot in those]) for site, those in branches.items()}
    simpler = loras(ranks, graft.shape)
    if values is None:
        return simpler, None
    operands = _operands(graft, values)
    found: dict[str, Tensor] = {}
    for index, site in simpler.sites:
        first = branches[site][0][1].scale or 1.0
        A = [operands[f"{i}.{site}.A"] for i, _ in branches[site]]
        B = [operands[f"{i}.{site}.B"] * (slot.scale / first) for i, slot in branches[site]]
        found |= {f"{index}.{site}.A": torch.cat(A), f"{index}.{site}.B": torch.cat(B)}
    return simpler, found


def _rank(branches: list[Branch]) -> Rank:
    """All ranks together, with the scale of the first branch, or 1 where that is 0; the others' is in their B."""
    r = sum(branch.rank for branch in branches)
    return Rank(r, (branches[0].scale or 1.0) * r, max(branch.dropout for branch in branches))


def _operands(graft: BoundGraft, values: Values) -> Values:
    with torch.no_grad():
        return Lowered(graft, _refuse, _refuse).make(values)


def _weightless(graft: BoundGraft) -> bool:
    """Whether the operands are made of the graft's own tensors alone: tried with zeros in one layer."""
    slots = graft.spec.slots
    if all(slot.form is None for slot in slots):
        return True
    first = tuple(replace(slot, layers=(min(slot.layers or (0,)),)) for slot in slots)
    one = BoundGraft(replace(graft.spec, slots=first), graft.shape)
    try:
        _operands(one, {tensor.name: torch.zeros(tensor.shape) for tensor in one.tensors})
    except FormatError:
        return False
    return True


def _refuse(*_: object) -> NoReturn:
    raise FormatError("form: its operands are made of the backbone's weights; name a backbone")

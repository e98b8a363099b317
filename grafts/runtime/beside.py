"""Which branches are computed together with the projections of one input, and their weights as serving multiplies
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polygraft.grafts.runtime.linear import add_multiplied, multiply, pack
from polygraft.grafts.runtime.stacks import Entries, Entry, Kind, Stack, Stacks
from polygraft.grafts.sites import Site
from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.op import FusedBranch


@dataclass(frozen=True)
class Beside(FusedBranch):
    """A branch beside a projection of a fused linear: what `kernels.branch.op.branch` takes, for `entries`."""

    entries: Entries


@dataclass(frozen=True, slots=True)
class Together:
    """All branches of one activation beside a fused linear as two frozen products: A [R, in], the members' ranks one
    after the other, and B^T [out, R], every member's in its own rows and columns and 0 elsewhere; `entries` are ranks
    of A."""

    A: Tensor
    B: Tensor
    entries: Entries
    act: str

    @staticmethod
    def of(beside: Sequence[Beside], widths: Sequence[int]) -> Together:
        """Packed copies of the branches' weights."""
        B = beside[0].B.new_zeros(sum(widths), sum(len(b.A) for b in beside))
        entries, first = [], 0
        for b in beside:
            low = sum(widths[: b.member])
            B[low : low + widths[b.member], first : first + len(b.A)] = b.B.T
            entries += [e._replace(first=e.first + first, last=e.last + first) for e in b.entries]
            first += len(b.A)
        return Together(pack(torch.cat([b.A for b in beside])), pack(B), tuple(entries), beside[0].act)

    def add(self, y_TO: Tensor, x_TI: Tensor, segments: Segments) -> Tensor:
        """y plus the branches; products with foreign ranks are selected out, so the weights must be finite."""
        hidden = ACTIVATIONS[self.act](multiply(x_TI, self.A))
        factor, foreign = segments.scales_TR(len(hidden), hidden.shape[1], hidden)
        return add_multiplied(y_TO, (hidden * factor).masked_fill_(foreign, 0).to(y_TO.dtype), self.B)


@dataclass(frozen=True, slots=True)
class Plan:
    """What stacks do beside a fused linear: branches `beside` the projections, the branches of every member that are
    computed `apart` from them, and those `together` that serving has asked for, by activation."""

    beside: tuple[Beside, ...] = ()
    apart: tuple[Entries, ...] = ()
    _together: dict[str, Together] = field(default_factory=dict)

    @staticmethod
    def of(group: Sequence[Site], stacks: Stacks, *, dropping: bool) -> Plan:
        """Apart are branches with a hidden bias, and those that do not read the projections' input as it is: by
        dropout, or by their graft's change of an input that others share."""
        beside, apart = [], []
        for member, site in enumerate(group):
            kinds = stacks.get(site)
            out = tuple(_apart(kinds, shared=len(group) > 1, dropping=dropping))
            apart.append(out)
            for kind, stack in _branches(kinds):
                entries = tuple(entry for entry in stack.entries if entry not in out)
                beside.append(Beside(member, stack.parts["A"], stack.parts["B"], activation(kind), entries))
        return Plan(tuple(b for b in beside if b.entries), tuple(apart))

    def together(self, act: str, widths: Sequence[int]) -> Together:
        """The branches of an activation as two products; their weights are copied the first time."""
        if act not in self._together:
            self._together[act] = Together.of([b for b in self.beside if b.act == act], widths)
        return self._together[act]


def _apart(kinds: Mapping[Kind, Stack], *, shared: bool, dropping: bool) -> Iterator[Entry]:
    changed = {e.graft for kind, stack in kinds.items() if shared and changes(kind, "in") for e in stack.entries}
    for _, stack in _branches(kinds):
        for entry in stack.entries:
            if "a" in stack.parts or entry.graft in changed or (dropping and entry.dropout):
                yield entry


def _branches(kinds: Mapping[Kind, Stack]) -> list[tuple[Kind, Stack]]:
    """Those without a gate that read their site's input."""
    return [(kind, stack) for kind, stack in kinds.items() if kind.op == "branch" and kind.variant.startswith("input")]


def activation(kind: Kind) -> str:
    """The activation of a branch kind, gated or not."""
    return kind.variant.split(".")[1]


def changes(kind: Kind, side: str) -> bool:
    """Whether the op replaces what comes in at, or goes out of, the site."""
    return kind.op in ("affine", "rotate") and kind.variant.startswith(side)

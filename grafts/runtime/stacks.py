"""Weight stacks: the tensors of all resident grafts, side by side for every site, in the layout and dtype that the
ops compute in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.lowering import Lowered, no_layers
from polygraft.grafts.methods.declare import Through
from polygraft.grafts.runtime.linear import FrozenLinear, padded
from polygraft.grafts.sites import Site
from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.spec import KV, Affine, Branch, Delta, GraftSpec, Norm, Rotate, Slot, Sparse, Tokens
from polygraft.kernels.norm.op import row_norm

if TYPE_CHECKING:
    from polygraft.grafts.runtime.beside import Plan

# Ops whose operands stay in float32 or wider: bf16 has no room near 1.
WIDE = ("affine", "norm", "delta", "sparse", "rotate", "tokens")


class Entry(NamedTuple):
    """Stack rows [first, last) belong to resident `graft`; `ends` are how many of a prompt's first and last tokens pass
    them, (0, 0) for all rows."""

    graft: int
    first: int
    last: int
    scale: float = 1.0
    dropout: float = 0.0
    ends: tuple[int, int] = (0, 0)


Entries = tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Resident:
    """A graft whose tensors are to be computed with; `tensors` by the names of the graft's, usually float32.

    `draw` is the number that forms are redrawn with at the step ahead (`methods.declare.Lowering`), None when served.
    """

    id: str
    graft: BoundGraft
    tensors: Mapping[str, Tensor]
    draw: Callable[[], int | None] = lambda: None

    @property
    def spec(self) -> GraftSpec:
        return self.graft.spec

    def to(self, device: torch.device) -> Resident:
        """The same with its tensors on a device; those that are there already are the same ones."""
        return replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})


class Kind(NamedTuple):
    """What may share one op call at a site: the op and the fields that change its arithmetic."""

    op: str
    variant: str = ""

    @property
    def gate(self) -> str:
        """The gate of rows that join attention's softmax, "" for everything else."""
        return self.variant.removeprefix("joined.") if self.variant.startswith("joined.") else ""


@dataclass(frozen=True, slots=True)
class Stack:
    """The tensors of one kind at one site, [rows of all its grafts, width] by part, and whose rows are where: those of
    its first part in `entries`, those of gates in `gates`."""

    kind: Kind
    entries: Entries
    parts: Mapping[str, Tensor]
    gates: Entries = ()


class Piece(NamedTuple):
    """Where a resident's operand lies: rows [first, last) of `stack`."""

    tensor: TensorSpec
    stack: Tensor
    first: int
    last: int

    def rows(self) -> Tensor:
        return self.stack.detach()[self.first : self.last]

    def gradient(self) -> Tensor | None:
        """The rows' share of the stack's gradient, None before a backward reached the site."""
        return None if self.stack.grad is None else self.stack.grad[self.first : self.last]


def weight(linears: Mapping[Site, tuple[FrozenLinear, int]], site: Site) -> Tensor:
    """W [out, in] of a projection, in float32 or wider."""
    linear, member = linears[site]
    weight = linear.weight().split_with_sizes(linear.widths)[member]
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(frozen=True)
class Stacks:
    """All stacks of a set of residents, by site; `pieces` by resident in the order of the graft's operands. `refresh`
    makes a resident's operands again after its tensors changed.

    Matrices and prefix rows are in the backbone's dtype, the operands of `WIDE` ops in float32 or wider, indices are
    integers.
    """

    residents: tuple[Resident, ...]
    lowered: tuple[Lowered, ...]
    at: Mapping[Site, Mapping[Kind, Stack]]
    pieces: tuple[tuple[Piece, ...], ...]
    linears: Mapping[Site, tuple[FrozenLinear, int]]
    trainable: bool = False
    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict)  # by fused linear, kept by the modules
    _empty: Mapping[Kind, Stack] = field(default_factory=dict)
    _copies: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(
        residents: Sequence[Resident],
        dtype: torch.dtype,
        linears: Mapping[Site, tuple[FrozenLinear, int]],
        through: Through = no_layers,
        *,
        device: torch.device,
        trainable: bool = False,
    ) -> Stacks:
        """Stacks holding `residents` in order, all on a device; with `trainable` each stack is a leaf that collects a
        gradient. `through` runs the rows of forms through the backbone's layers."""
        residents = [resident.to(device) for resident in residents]
        places: dict[tuple[Site, Kind], dict[str, list[tuple[int, TensorSpec, Slot]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        lowered = tuple(Lowered(r.graft, lambda site: weight(linears, site), through) for r in residents)
        for index, (resident, own_lowered) in enumerate(zip(residents, lowered)):
            for tensor in own_lowered.operands:
                assert tensor.site is not None
                slot = resident.spec.slots[tensor.slot]
                places[tensor.site, _kind(slot)][tensor.part].append((index, tensor, slot))
        at: dict[Site, dict[Kind, Stack]] = defaultdict(dict)
        pieces: list[list[Piece]] = [[] for _ in residents]
        wide = torch.promote_types(dtype, torch.float32)
        # One order of the kinds at a site, whoever came first: what a row meets must not depend on the other grafts.
        # Reversed, so that a scale comes before a shift (y * g + b).
        for (site, kind), parts in sorted(places.items(), reverse=True):
            built: dict[str, Tensor] = {}
            placed: dict[str, Entries] = {}
            for part, members in parts.items():
                heights = [tensor.shape[0] if len(tensor.shape) == 2 else 1 for _, tensor, _ in members]
                kept = torch.int64 if part == "i" else wide if kind.op in WIDE else dtype
                stack = torch.empty(sum(heights), members[0][1].shape[-1], dtype=kept, device=device)
                built[part], first = stack, 0
                entries: list[Entry] = []
                for (index, tensor, slot), height in zip(members, heights):
                    pieces[index].append(Piece(tensor, stack, first, first + height))
                    says = (slot.scale, slot.dropout, (slot.first, slot.last)) if isinstance(slot, Branch) else ()
                    entries.append(Entry(index, first, first + height, *says))
                    first += height
                placed[part] = tuple(entries)
            if kind.op == "norm":
                built["norm"] = torch.ones_like(built["m"])
            at[site][kind] = Stack(kind, next(iter(placed.values())), built, placed.get("G", ()))
        for made, own in zip(lowered, pieces):
            order = {tensor.name: i for i, tensor in enumerate(made.operands)}
            own.sort(key=lambda piece: order[piece.tensor.name])
        stacks = Stacks(tuple(residents), lowered, at, tuple(map(tuple, pieces)), linears, trainable)
        for index in range(len(residents)):
            stacks.refresh(index)
        if trainable:
            for index in range(len(residents)):
                for piece in stacks.pieces[index]:
                    piece.stack.requires_grad_(piece.stack.is_floating_point())
        return stacks

    def get(self, site: Site) -> Mapping[Kind, Stack]:
        """The stacks at a site by kind, empty when no graft acts there."""
        return self.at.get(site, self._empty)

    @cached_property
    def generators(self) -> Mapping[Site, Mapping[int, Callable[[Tensor], Tensor]]]:
        """What makes the dense matrices of the deltas at a site, by their first row in the stack."""
        found: dict[Site, dict[int, Callable[[Tensor], Tensor]]] = defaultdict(dict)
        for resident, made, own in zip(self.residents, self.lowered, self.pieces):
            for piece in own:
                slot, site = piece.tensor.slot, piece.tensor.site
                if piece.tensor.part == "t" and site is not None:
                    found[site][piece.first] = made.generator(slot, site, resident.tensors, resident.draw)
        return found

    def refresh(self, graft: int) -> None:
        """Make a resident's operands in the stacks, and recompute what depends on them (DoRA's norms)."""
        with torch.no_grad():
            torch._foreach_copy_(*self._copied(graft))
            for piece in self.pieces[graft]:
                if piece.tensor.part == "m" and piece.tensor.site is not None:
                    self._renorm(piece.tensor.site, graft)

    def _copied(self, graft: int) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of the stacks, and the operands to copy there; kept where these are the resident's own tensors."""
        if graft in self._copies:
            return self._copies[graft]
        resident, made, pieces = self.residents[graft], self.lowered[graft], self.pieces[graft]
        source = made.make(resident.tensors, resident.draw())
        rows = [piece.rows() for piece in pieces]
        copies = rows, [source[piece.tensor.name].reshape(row.shape) for piece, row in zip(pieces, rows)]
        if made.same:
            self._copies[graft] = copies
        return copies

    def gradient(self, graft: int, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient of a resident's trained tensors, in their order, from that of its operands."""
        resident, made = self.residents[graft], self.lowered[graft]
        return found if made.same else made.pull(resident.tensors, found, resident.draw())

    def gradients(self) -> list[list[Tensor | None]]:
        """What a backward left for every resident's operands: flat views in the order of its pieces, None where it
        never came."""
        found: list[list[Tensor | None]] = [[None] * len(own) for own in self.pieces]
        for stack, shares in self._shares:
            if stack.grad is not None:
                views = stack.grad.view(-1).split_with_sizes([size for _, _, size in shares])
                for (graft, position, _), view in zip(shares, views):
                    found[graft][position] = view
        return found

    @cached_property
    def _shares(self) -> list[tuple[Tensor, list[tuple[int, int, int]]]]:
        """Of each stack tensor, in row order: (resident, position among its pieces, elements)."""
        by_stack: dict[int, tuple[Tensor, list[tuple[int, int, int]]]] = {}
        for graft, own in enumerate(self.pieces):  # residents lie in the stacks in their order
            for position, piece in enumerate(own):
                by_stack.setdefault(id(piece.stack), (piece.stack, []))[1].append((graft, position, piece.tensor.numel))
        return list(by_stack.values())

    def _renorm(self, site: Site, graft: int) -> None:
        norm = self.at[site][Kind("norm")]
        linear, member = self.linears[site]
        low = sum(linear.widths[:member])
        square = linear.row_sq[low : low + linear.widths[member]]
        branches = [
            (stack, entry)
            for kind, stack in self.at[site].items()
            if kind.op == "branch"
            for entry in stack.entries
            if entry.graft == graft
        ]
        if len(branches) != 1:
            raise AssertionError(f"{site}: DoRA's norm is over one branch of its graft, found {len(branches)}")
        stack, entry = branches[0]
        A, B = stack.parts["A"].detach()[entry.first : entry.last], stack.parts["B"].detach()[entry.first : entry.last]
        rows = A.new_zeros(padded(len(A)), A.shape[1])
        rows[: len(A)] = A
        AW = linear.product_alone(rows)[: len(A), low : low + linear.widths[member]]
        total = row_norm(square, AW, A, B, entry.scale)
        index = next(entry.first for entry in norm.entries if entry.graft == graft)
        norm.parts["norm"][index] = total.to(norm.parts["norm"].dtype)

    def leaves(self) -> Iterator[Tensor]:
        """Every distinct stack tensor that a gradient is collected in."""
        for kinds in self.at.values():
            for stack in kinds.values():
                for part, tensor in stack.parts.items():
                    if part != "norm":
                        yield tensor


def _kind(slot: Slot) -> Kind:
    match slot:
        case Branch(tap=tap, act=act, bias=bias, gate="none"):
            return Kind("branch", f"{tap}.{act}{'.a' if bias else ''}")
        case Branch(tap=tap, act=act, gate="attention", experts=experts):
            return Kind("gated", f"{tap}.{act}.attention.0.{experts}")
        case Branch(tap=tap, act=act, gate=gate, top=top):
            return Kind("gated", f"{tap}.{act}.{gate}.{top}.0")
        case Affine(side=side, scale=scale, shift=shift):
            return Kind("affine", f"{side}{'.g' if scale else ''}{'.b' if shift else ''}")
        case Norm():
            return Kind("norm")
        case KV(gate="none", aside=aside):
            return Kind("kv", "aside" if aside else "")
        case KV(gate=gate):
            return Kind("kv", f"joined.{gate}")
        case Delta():
            return Kind("delta")
        case Sparse(rows=rows):
            return Kind("sparse", "rows" if rows else "entries")
        case Rotate():
            return Kind("rotate", f"{slot.side}.{slot.variant}")
        case Tokens(mode=mode, gate="none"):
            return Kind("tokens", mode)
        case Tokens(gate=gate):
            return Kind("tokens", f"gated.{gate}")

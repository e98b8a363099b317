"""The tensors of a slot at its sites: names, shapes and starting values. Torch-free, derived from the slot.

A slot has tensors (what is trained, saved and moved) and operands (what the op computes with). They are the same but
for slots with a form, whose operands are a function of their tensors (`grafts/lowering.py`). Those of all slots are a
`BoundGraft`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from polygraft.grafts.head import Head
from polygraft.grafts.methods.declare import SiteShape, TensorDecl
from polygraft.grafts.methods.registry import form
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import (
    KV,
    Affine,
    Branch,
    DeclRef,
    Delta,
    Norm,
    Rotate,
    Slot,
    Sparse,
    SpecError,
    Tokens,
)

SHARED = "shared"
HEAD = -1  # in the place of a slot's number


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its slot (HEAD: it is the classifier's) and site (None: shared by all sites of the slot), its part of
    the op or form (A, B of a branch; g, b of an affine; m; k, v), its shape, how it starts, and whether it is
    trained."""

    slot: int
    site: Site | None
    part: str
    shape: tuple[int, ...]
    start: DeclRef
    trained: bool = True

    @property
    def name(self) -> str:
        return f"head.{self.part}" if self.slot == HEAD else f"{self.slot}.{self.site or SHARED}.{self.part}"

    @property
    def numel(self) -> int:
        return prod(self.shape)


def tensors_of(index: int, slot: Slot, places: Mapping[Site, SiteShape]) -> Iterator[TensorSpec]:
    """The tensors of slot number `index` at its sites: what they share before what is a site's own."""
    declared = form(slot.form.name) if slot.form else None
    arguments = slot.form.keywords() if slot.form else {}
    shared = declared.shared(slot, tuple(places.values()), **arguments) if declared else {}
    yield from _specs(index, slot, None, shared)
    for site, place in places.items():
        own = declared.own(slot, place, **arguments) if declared else parts(slot, place)
        yield from _specs(index, slot, site, own)


def head_tensors(head: Head, hidden: int) -> Iterator[TensorSpec]:
    """The tensors of a classifier over hidden states of this width."""
    for part, (shape, start, trained) in head.parts(hidden).items():
        yield TensorSpec(HEAD, None, part, shape, DeclRef(start), trained)


def operands_of(index: int, slot: Slot, places: Mapping[Site, SiteShape]) -> Iterator[TensorSpec]:
    """The operands of slot number `index`, site by site. A is [rank, in]; B lies transposed, [rank, out]; the operand
    of a delta is its form's trained tensors at the site, flat, as a column."""
    for site, place in places.items():
        if isinstance(slot, Delta):
            rows = sum(prod(part.shape) for part in _generating(slot, tuple(places.values()), place))
            yield from _specs(index, slot, site, {"t": TensorDecl((rows, 1))})
        else:
            yield from _specs(index, slot, site, parts(slot, place))


def parts(slot: Slot, place: SiteShape) -> Mapping[str, TensorDecl]:
    """The operands of an op at a place, which without a form are the slot's tensors too."""
    match slot:
        case Branch(rank=rank, bias=bias, gate=gate, experts=experts):
            factors = {"A": TensorDecl((rank, place.d_in), "kaiming"), "B": TensorDecl((rank, place.d_out))}
            read = TensorDecl((rank if gate in ("attention", "noise") else experts, place.d_in), "kaiming")
            scores = {"G": read} if gate != "none" else {}
            return factors | ({"a": TensorDecl((rank, 1))} if bias else {}) | scores
        case Affine(scale=scale, shift=shift, side=side):
            width = (place.d_in if side == "in" else place.d_out,)
            return ({"g": TensorDecl(width, "one")} if scale else {}) | ({"b": TensorDecl(width)} if shift else {})
        case Norm():
            return {"m": TensorDecl((place.d_out,), "row_norm")}
        case KV(length=length, gate=gate, experts=experts):
            rows = {part: TensorDecl((length, place.d_out), "prefix") for part in ("k", "v")}
            return rows | ({"G": TensorDecl((experts, place.d_in), "kaiming")} if gate != "none" else {})
        case Delta():
            return {}
        case Sparse():
            return sparse_parts(slot, place)
        case Rotate():
            return rotate_parts(slot, place)
        case Tokens(length=length, gate="highest", experts=experts):
            prompts = TensorDecl((experts * length, place.d_out), "embedded")
            return {"p": prompts, "G": TensorDecl((experts, place.d_out), "kaiming")}
        case Tokens(length=length, gate="relu", experts=experts):
            weights = {"G": TensorDecl((experts, place.d_out), "kaiming"), "a": TensorDecl((experts, 1))}
            return {
                "p": TensorDecl((experts * length, place.d_out)),
                **weights,
                "c": TensorDecl((length, place.d_out), "embedded"),
            }
        case Tokens(length=length, mode=mode):
            return {"p": TensorDecl((length, place.d_out), "zero" if mode == "add" else "embedded")}


def sparse_parts(slot: Sparse, place: SiteShape) -> Mapping[str, TensorDecl]:
    """Values w beside the (row, column) of each; or whole rows w [n, in] beside the row of each."""
    count = slot.count(place.d_in, place.d_out)
    width, indices = (place.d_in, 1) if slot.rows else (1, 2)
    return {"w": TensorDecl((count, width)), "i": TensorDecl((count, indices), slot.pick, trained=False)}


def rotate_parts(slot: Rotate, place: SiteShape) -> Mapping[str, TensorDecl]:
    """What is added to the identity: blocks D, stage by stage; A and B; or cosines c and sines s."""
    width = place.d_in if slot.side == "in" else place.d_out
    slot.check(width)
    match slot.kind:
        case "blocks":
            return {"D": TensorDecl((slot.stages * width, slot.size))}
        case "lowrank":
            return {"A": TensorDecl((slot.size, width), "kaiming"), "B": TensorDecl((slot.size, width))}
        case "pairs":
            return {"c": TensorDecl((width,), "one"), "s": TensorDecl((width,))}


def _specs(index: int, slot: Slot, site: Site | None, declared: Mapping[str, TensorDecl]) -> Iterator[TensorSpec]:
    for name, part in declared.items():
        if any(size < 0 for size in part.shape):
            raise SpecError(f"{slot.op}: its {name} would have the shape {list(part.shape)}; give sizes of at least 1")
        start = slot.start if slot.start is not None else part.start
        start = DeclRef(start) if isinstance(start, str) else start
        yield TensorSpec(index, site, name, part.shape, start, part.trained and not slot.frozen)


def _generating(slot: Delta, places: tuple[SiteShape, ...], place: SiteShape) -> list[TensorDecl]:
    """What the operand of a delta is made of: the tensors its form reads at a place that train, all if none does."""
    assert slot.form is not None
    declared, arguments = form(slot.form.name), slot.form.keywords()
    read = [*declared.shared(slot, places, **arguments).values(), *declared.own(slot, place, **arguments).values()]
    return [part for part in read if part.trained and not slot.frozen] or read

"""Folding a graft into the weights it grows on: golden W + dW of every projection, in float32 or wider.

Nothing is changed in place: the backbone's own weights stay what they are, so that there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.lowering import Lowered, Values
from polygraft.grafts.methods.declare import IntegerGrid
from polygraft.grafts.runtime.keys import rotation
from polygraft.grafts.sites import ENDS, LINEAR, NORMS, Site, mergeable
from polygraft.grafts.spec import Affine, Branch, Delta, Norm, Rotate, Slot, Sparse, SpecError
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.rotate.op import rotate


@dataclass(frozen=True, slots=True)
class Merged:
    """A projection y = W x + bias with a graft inside; W [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def of_scaled(self, g: Tensor | None, b: Tensor | None) -> Merged:
        """The projection of g x + b."""
        scaled = self.weight if g is None else self.weight * g
        return Merged(scaled, _sum(self.bias, None if b is None else self.weight @ b))

    def of_rotated(self, R: Tensor | None) -> Merged:
        """The projection of x R."""
        return self if R is None else Merged(self.weight @ R.T, self.bias)

    def rotated(self, R: Tensor | None) -> Merged:
        """y R."""
        if R is None:
            return self
        return Merged(R.T @ self.weight, None if self.bias is None else R.T @ self.bias)

    def scaled(self, g: Tensor | None, b: Tensor | None) -> Merged:
        """g y + b."""
        weight = self.weight if g is None else g[:, None] * self.weight
        bias = self.bias if self.bias is None or g is None else g * self.bias
        return Merged(weight, _sum(bias, b))

    def branched(self, M: Tensor) -> Merged:
        """y + M y; M is 0 where there is none."""
        if M.ndim == 0:
            return self
        return Merged(self.weight + M @ self.weight, None if self.bias is None else self.bias + M @ self.bias)


class Fold:
    """A graft on the way into the weights of a backbone: `sites` are the projections it changes, `at` folds one.

    In the order of a site (docs/architecture.md): with x' = g_in R_in x + b_in (what a norm's affine leaves, then the
    projection's own), y = R_out (g_out (g_rows (m / n) (W + dW) x' + bias) + b_out); what a sublayer's output goes
    through is folded into its last projection. `weight` gives W [out, in] in float32 or wider, `bias` its bias.
    Raises SpecError for a graft that is not affine in what its sites read.
    """

    def __init__(
        self,
        graft: BoundGraft,
        values: Values,
        weight: Callable[[Site], Tensor],
        bias: Callable[[Site], Tensor | None] = lambda _: None,
    ) -> None:
        if not mergeable(graft.spec):
            raise SpecError(f"peft: {graft.spec.method!r} cannot be folded into weights; serve it beside them")
        self._weight, self._bias, self._values = weight, bias, values
        self._table = architecture(graft.shape.arch)
        self._lowered = Lowered(graft, weight)
        with torch.no_grad():
            self._operands = self._lowered.make(values)
        self._slots: dict[Site, list[tuple[int, Slot]]] = {}
        for index, site in graft.sites:
            self._slots.setdefault(site, []).append((index, graft.spec.slots[index]))
        self.sites = tuple(sorted({projection for site in self._slots for projection in self._projections(site)}))

    @torch.no_grad()
    def at(self, site: Site) -> Merged:
        """The projection as it is with the graft folded in."""
        W, bias = self._weight(site), self._bias(site)
        merged = Merged(self._inner(site, W), None).of_scaled(*self._affine(site, "in", W))
        merged = merged.of_rotated(self._rotation(site, "in", W))
        for norm in NORMS:
            if site.name in self._table.readers(norm):
                merged = merged.of_scaled(*self._affine(Site(site.layer, norm), "out", W))
        merged = merged.scaled(*self._affine(site, "rows", W))
        merged = merged.scaled(None, None if bias is None else bias.to(W))
        merged = merged.scaled(*self._affine(site, "out", W)).rotated(self._rotation(site, "out", W))
        for sublayer, last in ENDS.items():
            if site.name == last:
                whole = Site(site.layer, sublayer)
                merged = merged.branched(self._branches(whole, W))
                merged = merged.scaled(*self._affine(whole, "out", W))
        return merged

    @torch.no_grad()
    def grid(self, site: Site) -> IntegerGrid | None:
        """The integers that the projection's weight is made of with the graft folded in, in the dtype of W; None where
        the graft puts it on no grid, or something else acts there, too."""
        return self._grid(site, self._weight(site))[1] if len(self._slots.get(site, ())) == 1 else None

    def _grid(self, site: Site, like: Tensor) -> tuple[int, IntegerGrid | None]:
        """The first slot that puts W on a grid, and the grid."""
        made = ((i, self._lowered.grid(i, site, self._values, like)) for i, _ in self._slots.get(site, ()))
        return next(((index, grid) for index, grid in made if grid is not None), (-1, None))

    def _inner(self, site: Site, W: Tensor) -> Tensor:
        """(m / n) (W + dW)."""
        branches, (on_grid, grid) = self._branches(site, W), self._grid(site, W)
        found = rescaled = W + branches
        if grid is not None:  # in place of W, so that nothing is rounded
            found = grid.weight() + branches
        for index, slot in self._slots.get(site, ()):
            if isinstance(slot, Delta) and index != on_grid:
                generate = self._lowered.generator(index, site, self._values)
                found = found + generate(self._operand(index, site, "t", W)).to(W)
            if isinstance(slot, Sparse):
                place, values = (self._operand(index, site, part, W) for part in "iw")
                values = values if slot.rows else values[:, 0]
                found = found.index_put(place.long().unbind(1), values, accumulate=True)
        for index, slot in self._slots.get(site, ()):
            if isinstance(slot, Norm):  # over W and its branch
                found = (self._operand(index, site, "m", W) / rescaled.square().sum(1).sqrt())[:, None] * found
        return found

    def _branches(self, site: Site, like: Tensor) -> Tensor:
        """Sum of s B A over the branches at a site, [out, in]."""
        total = torch.zeros((), dtype=like.dtype)
        for index, slot in self._slots.get(site, ()):
            if isinstance(slot, Branch):
                A, B = (self._operand(index, site, part, like) for part in "AB")
                total = total + slot.scale * B.T @ A
        return total

    def _affine(self, site: Site, side: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The one scale and the one shift on a side of a site."""
        g = b = None
        for index, slot in self._slots.get(site, ()):
            if isinstance(slot, Affine) and slot.side == side:
                g = self._operand(index, site, "g", like) if slot.scale else g
                b = self._operand(index, site, "b", like) if slot.shift else b
        return g, b

    def _rotation(self, site: Site, side: str, like: Tensor) -> Tensor | None:
        """R [width, width] of the one rotation on a side of a site."""
        for index, slot in self._slots.get(site, ()):
            if isinstance(slot, Rotate) and slot.side == side:
                stem = f"{index}.{site}."
                own = {
                    n.removeprefix(stem): t.view(-1, t.shape[-1]).to(like)
                    for n, t in self._operands.items()
                    if n.startswith(stem)
                }
                one = torch.eye(like.shape[1 if side == "in" else 0], dtype=like.dtype)
                rows = max(len(operand) for operand in own.values())
                return rotate(one, own, rotation(slot), Segments((Segment(0, len(one), 0, rows),)))
        return None

    def _projections(self, site: Site) -> tuple[Site, ...]:
        """Where what happens at a site is folded in."""
        if site.name in LINEAR:
            return (site,)
        names = self._table.readers(site.name) if site.name in NORMS else (ENDS[site.name],)
        if not names:
            raise SpecError(f"at: {site} of {self._table.model_type} is read by more than projections")
        return tuple(Site(site.layer, name) for name in names)

    def _operand(self, index: int, site: Site, part: str, like: Tensor) -> Tensor:
        return self._operands[f"{index}.{site}.{part}"].to(like)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b

"""Folding a graft into the weights it grows on: golden W + dW of every projection, in float32 or wider.

Nothing is changed in place: the backbone's own weights stay what they are, so that there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.grafts.lowering import Lowered, Values
from polygraft.grafts.sites import ENDS, FEEDS, LINEAR, ModelShape, Site, resolve
from polygraft.grafts.spec import Affine, Branch, Delta, GraftSpec, Norm, Slot, SpecError


@dataclass(frozen=True, slots=True)
class Merged:
    """A projection y = W x + bias with a graft inside; W [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def of_scaled(self, g: Tensor | None, b: Tensor | None) -> Merged:
        """The projection of g x + b."""
        scaled = self.weight if g is None else self.weight * g
        return Merged(scaled, _sum(self.bias, None if b is None else self.weight @ b))

    def scaled(self, g: Tensor | None, b: Tensor | None) -> Merged:
        """g y + b."""
        weight = self.weight if g is None else g[:, None] * self.weight
        bias = self.bias if self.bias is None or g is None else g * self.bias
        return Merged(weight, _sum(bias, b))

    def branched(self, M: Tensor) -> Merged:
        """y + M y."""
        return Merged(self.weight + M @ self.weight, None if self.bias is None else self.bias + M @ self.bias)


def merge(
    spec: GraftSpec,
    shape: ModelShape,
    values: Values,
    weight: Callable[[Site], Tensor],
    bias: Callable[[Site], Tensor | None] = lambda _: None,
) -> dict[Site, Merged]:
    """Every projection that the graft changes, as it is with the graft folded in.

    In the order of a site (docs/architecture.md): with x' = g_in x + b_in (what a norm's affine leaves, then the
    projection's own), y = g_out ((m / n) (W + dW) x' + bias) + b_out; what a sublayer's output goes through is folded
    into its last projection. `weight` gives W [out, in] in float32 or wider, `bias` its bias. Raises SpecError for a
    graft that is not affine in what its sites read.
    """
    if not spec.mergeable:
        raise SpecError(f"peft: {spec.method!r} cannot be folded into weights; serve it beside them")
    lowered = Lowered(spec, shape, weight)
    with torch.no_grad():
        operands = lowered.make(values)
        slots = _Slots(spec, shape, lowered, operands)
        touched = sorted({projection for site in slots.sites for projection in _projections(site)})
        return {site: _merged(site, slots, weight(site), bias(site)) for site in touched}


class _Slots:
    """The slots at a site, each with its operands in the dtype of a weight."""

    def __init__(self, spec: GraftSpec, shape: ModelShape, lowered: Lowered, operands: Values) -> None:
        self._at: dict[Site, list[tuple[int, Slot]]] = {}
        for index, slot in enumerate(spec.slots):
            for site in resolve(slot, shape):
                self._at.setdefault(site, []).append((index, slot))
        self._lowered, self._operands = lowered, operands

    @property
    def sites(self) -> Iterable[Site]:
        return self._at

    def of(self, site: Site) -> Iterable[tuple[Slot, Callable[[str], Tensor]]]:
        """Slots with their operands by part; the part W of a delta is its dense matrix."""
        for index, slot in self._at.get(site, ()):

            def part(name: str, index: int = index, slot: Slot = slot) -> Tensor:
                if isinstance(slot, Delta):
                    return self._lowered.generator(index, site)(self._operands[f"{index}.{site}.t"])
                return self._operands[f"{index}.{site}.{name}"]

            yield slot, part


def _merged(site: Site, slots: _Slots, W: Tensor, bias: Tensor | None) -> Merged:
    base = W
    found, magnitude = W, None
    for slot, part in slots.of(site):
        match slot:
            case Branch():
                dW = slot.scale * part("B").T.to(W) @ part("A").to(W)
                found, base = found + dW, base + dW
            case Delta():
                found = found + part("W").to(W)
            case Norm():
                magnitude = part("m").to(W)
    if magnitude is not None:  # the norm is over W and its branch
        found = (magnitude / base.square().sum(1).sqrt())[:, None] * found
    merged = Merged(found, None).of_scaled(*_affine(slots, site, "in", W))
    for norm, readers in FEEDS.items():
        if site.name in readers:
            merged = merged.of_scaled(*_affine(slots, Site(site.layer, norm), "out", W))
    merged = merged.scaled(None, None if bias is None else bias.to(W))
    merged = merged.scaled(*_affine(slots, site, "out", W))
    for sublayer, last in ENDS.items():
        if site.name == last:
            whole = Site(site.layer, sublayer)
            taps = [s.scale * p("B").T.to(W) @ p("A").to(W) for s, p in slots.of(whole) if isinstance(s, Branch)]
            if taps:
                merged = merged.branched(torch.stack(taps).sum(0))
            merged = merged.scaled(*_affine(slots, whole, "out", W))
    return merged


def _affine(slots: _Slots, site: Site, side: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The one scale and the one shift on a side of a site."""
    g = b = None
    for slot, part in slots.of(site):
        if isinstance(slot, Affine) and slot.side == side:
            g = part("g").to(like) if slot.scale else g
            b = part("b").to(like) if slot.shift else b
    return g, b


def _projections(site: Site) -> tuple[Site, ...]:
    """Where what happens at a site is folded in."""
    if site.name in LINEAR:
        return (site,)
    names = FEEDS[site.name] if site.name in FEEDS else (ENDS[site.name],)
    return tuple(Site(site.layer, name) for name in names)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b

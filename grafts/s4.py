"""S4: which methods each group of layers has, and how large they may be for a budget (Chen et al. 2023, arXiv
2301.01821). Torch-free; what comes out is a union as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError

# The found model (for T5-base): adapters A, LoRA L, prefix P and biases B, from the lowest group up.
FOUND = ("AL", "AP", "APB", "PBL")
_TERMS = {"A": "serial({}, at=ffn.out)", "L": "lora(r={0}, alpha={0}, at=attn.[qv])", "P": "prefix({})", "B": "bitfit"}
_SPINDLE = (1, 2, 2, 1)  # groups in the middle have more layers than those at the ends


def s4(shape: ModelShape, budget: int, strategies: Sequence[str] = FOUND) -> str:
    """The union of the largest sizes within `budget` trainable parameters.

    Layers are grouped as a spindle; every layer may spend the same, and in a layer every method of its group does
    (the even assignments that the paper found best). Biases cost what they cost; all prefixes have one length, the
    shortest that a group affords, and what it leaves goes to the group's other methods. Raises SpecError for a budget
    that is too small for one of each, too few layers, or a letter that is no method.
    """
    if len(strategies) != len(_SPINDLE) or not all(group and set(group) <= _TERMS.keys() for group in strategies):
        raise SpecError(f"strategies: {tuple(strategies)!r} are not four groups of {', '.join(_TERMS)}")
    groups = _groups(shape.layers)
    unit = {name: _cost(shape, name, 2) - _cost(shape, name, 1) for name in "ALP"}
    biases = _cost(shape, "B", 1)
    allowed = budget // shape.layers
    spare = {group: allowed - biases * ("B" in group) for group in strategies}
    sized = {group: [name for name in "APL" if name in group] for group in strategies}
    prefixed = [spare[group] // len(sized[group]) // unit["P"] for group in strategies if "P" in group]
    length = min(prefixed, default=0)
    terms: list[str] = []
    places: dict[str, list[int]] = {}
    for layers, group in zip(groups, strategies, strict=True):
        rest = [name for name in sized[group] if name != "P"]
        left = spare[group] - (unit["P"] * length if "P" in group else 0)
        sizes = {name: left // len(rest) // unit[name] for name in rest} | ({"P": length} if "P" in group else {})
        if left < 0 or any(size < 1 for size in sizes.values()):
            raise SpecError(f"budget: {budget} is too small for {group!r} in {shape.layers} layers; give more")
        for name in group:
            places.setdefault(_TERMS[name].format(sizes.get(name, 0)), []).extend(layers)
    for term, where in places.items():
        terms.append(f"{term}@{_ranges(where)}")
    return " + ".join(terms)


def _groups(layers: int) -> list[range]:
    if layers < len(_SPINDLE):
        raise SpecError(f"layers: {layers} do not make {len(_SPINDLE)} groups")
    ends = [max(i + 1, round(layers * part / sum(_SPINDLE))) for i, part in enumerate(accumulate(_SPINDLE))]
    return [range(low, high) for low, high in pairwise([0, *ends])]


def _cost(shape: ModelShape, name: str, size: int) -> int:
    """Parameters of a method in one layer."""
    return BoundGraft(parse(f"{_TERMS[name].format(size)}@0"), shape).parameters


def _ranges(layers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][1] == layer - 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)

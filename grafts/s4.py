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
# How many layers the groups have, from the lowest up, in shares.
GROUPINGS = {
    "increasing": (1, 2, 3, 4),
    "uniform": (1, 1, 1, 1),
    "decreasing": (4, 3, 2, 1),
    "spindle": (1, 2, 2, 1),
    "bottleneck": (2, 1, 1, 2),
}
# What a layer of each group may spend, in shares.
SPENDINGS = {"increasing": (1, 2, 3, 4), "uniform": (1, 1, 1, 1), "decreasing": (4, 3, 2, 1)}


def s4(
    shape: ModelShape,
    budget: int,
    strategies: Sequence[str] = FOUND,
    *,
    grouping: str = "spindle",
    spending: str = "uniform",
) -> str:
    """The union of the largest sizes within `budget` trainable parameters; a group without a strategy ("") has nothing.

    Layers are grouped, and what a layer may spend rises or falls with its group (by default the assignments that the
    paper found best: a spindle, and all layers the same); in a layer every method of its group spends the same. Biases
    cost what they cost; all prefixes have one length, the shortest that a group affords, and what it leaves goes to the
    group's other methods. Raises SpecError for a budget that is too small for one of each, too few layers, a letter
    that is no method, or an unknown pattern.
    """
    if (
        len(strategies) != _GROUPS
        or not any(strategies)
        or not all(set(group) <= _TERMS.keys() for group in strategies)
    ):
        raise SpecError(f"strategies: {tuple(strategies)!r} are not four groups of {', '.join(_TERMS)}")
    for field, name, known in (("grouping", grouping, GROUPINGS), ("spending", spending, SPENDINGS)):
        if name not in known:
            raise SpecError(f"{field}: {name!r} is unknown; choices: {', '.join(known)}")
    tuned = [
        (layers, group, share)
        for layers, group, share in zip(
            _groups(shape.layers, GROUPINGS[grouping]), strategies, SPENDINGS[spending], strict=True
        )
        if group
    ]
    shares = sum(len(layers) * share for layers, _, share in tuned)
    unit = {name: _cost(shape, name, 2) - _cost(shape, name, 1) for name in "ALP"}
    biases = _cost(shape, "B", 1)
    spare = [budget * share // shares - biases * ("B" in group) for _, group, share in tuned]
    sized = [[name for name in "APL" if name in group] for _, group, _ in tuned]
    prefixed = [left // len(names) // unit["P"] for left, names in zip(spare, sized, strict=True) if "P" in names]
    length = min(prefixed, default=0)
    terms: list[str] = []
    places: dict[str, list[int]] = {}
    for (layers, group, _), own, names in zip(tuned, spare, sized, strict=True):
        rest = [name for name in names if name != "P"]
        left = own - (unit["P"] * length if "P" in group else 0)
        sizes = {name: left // len(rest) // unit[name] for name in rest} | ({"P": length} if "P" in group else {})
        if left < 0 or any(size < 1 for size in sizes.values()):
            raise SpecError(f"budget: {budget} is too small for {group!r} in {shape.layers} layers; give more")
        for name in group:
            places.setdefault(_TERMS[name].format(sizes.get(name, 0)), []).extend(layers)
    for term, where in places.items():
        terms.append(f"{term}@{_ranges(where)}")
    return " + ".join(terms)


_GROUPS = 4


def _groups(layers: int, shares: Sequence[int]) -> list[range]:
    if layers < _GROUPS:
        raise SpecError(f"layers: {layers} do not make {_GROUPS} groups")
    whole = sum(shares)
    ends = [max(i + 1, round(layers * part / whole)) for i, part in enumerate(accumulate(shares))]
    ends = [min(end, layers - (_GROUPS - 1 - i)) for i, end in enumerate(ends)]
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

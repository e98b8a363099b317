"""S4's unions: groups of layers with their methods, within a budget by construction."""

from __future__ import annotations

import pytest

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.s4 import s4
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import KV, Affine, Branch, SpecError

SMOLLM2 = ModelShape("llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)


@pytest.mark.parametrize("budget", [400_000, 1_000_000, 3_333_333])
def test_the_budget_is_kept_and_used(budget: int) -> None:
    spent = BoundGraft(parse(s4(SMOLLM2, budget)), SMOLLM2).parameters
    assert 0.9 * budget < spent <= budget


def test_each_group_of_the_spindle_has_its_methods() -> None:
    graft = BoundGraft(parse(s4(SMOLLM2, 1_000_000)), SMOLLM2)
    has: dict[int, set[str]] = {}
    for index, site in graft.sites:
        match graft.spec.slots[index]:
            case Branch(tap="output"):
                letter = "A"
            case Branch():
                letter = "L"
            case KV():
                letter = "P"
            case Affine(shift=True):
                letter = "B"
        has.setdefault(site.layer, set()).add(letter)
    expected = ["AL"] * 5 + ["AP"] * 10 + ["APB"] * 10 + ["PBL"] * 5
    assert [has[layer] for layer in range(30)] == [set(group) for group in expected]


def test_a_method_that_shares_its_layer_gets_half_of_it() -> None:
    spec = parse(s4(SMOLLM2, 900_000, ("A", "AL", "L", "AL")))
    assert not spec.prefix_length
    sizes = {slot.rank for slot in spec.slots if isinstance(slot, Branch) and slot.tap == "output"}
    assert len(sizes) == 2 and max(sizes) in (2 * min(sizes), 2 * min(sizes) + 1)


@pytest.mark.parametrize(
    ("layers", "budget", "strategies", "wrong"),
    [
        (30, 10_000, ("AL", "AP", "APB", "PBL"), "budget: 10000 is too small"),
        (3, 900_000, ("AL", "AP", "APB", "PBL"), "layers: 3"),
        (30, 900_000, ("AL", "AP"), "four groups"),
        (30, 900_000, ("AL", "AX", "A", "A"), "four groups"),
    ],
)
def test_what_cannot_be_built_is_refused(layers: int, budget: int, strategies: tuple[str, ...], wrong: str) -> None:
    shape = ModelShape("llama", layers, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
    with pytest.raises(SpecError, match=wrong):
        s4(shape, budget, strategies)

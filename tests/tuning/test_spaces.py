"""The spaces in the box: every point is a union that means something on the bundled backbone, within the limit."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse, terms
from polygraft.grafts.methods.registry import find, methods
from polygraft.grafts.s4 import GROUPINGS, s4
from polygraft.grafts.sites import ModelShape, mergeable
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import RELATIVE, Rates, Space
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Choice, InvalidConfig, Whole, at_shares, check
from polygraft.tuning.spaces.positions import positions
from polygraft.tuning.spaces.request import SpaceRequest, weights
from polygraft.tuning.spaces.s4 import STRATEGIES, s4_space
from polygraft.tuning.spaces.supernets import lora_ranks, nls, noah
from polygraft.tuning.spaces.which import which
from tests.tuning.standin import SHAPE

# SmolLM2-135M's, the bundled backbone
SMOLLM2 = ModelShape("llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
BERT = ModelShape("bert", layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, vocab=30522)
REQUEST: TypeAdapter[SpaceRequest] = TypeAdapter(SpaceRequest)

BOX: dict[str, Callable[[], AnySpace]] = {
    "autopeft": lambda: autopeft(SMOLLM2, most=2_000_000),
    "s4": lambda: s4_space(SMOLLM2, most=1_000_000),
    "noah": lambda: noah(SMOLLM2),
    "nls": lambda: nls(SMOLLM2, groups=10),
    "lora ranks": lambda: lora_ranks(SMOLLM2, groups=2, most=5_000_000),
    "positions": lambda: positions(SMOLLM2, most=200_000),
    "which": lambda: which(SMOLLM2),
}
EXPECTED = r"is off|left out|no group is tuned|are more than|is too small"  # why a point may mean no graft


@pytest.mark.parametrize("kind", BOX)
def test_every_point_is_a_union_that_binds_to_the_bundled_backbone_or_says_why_it_is_none(kind: str) -> None:
    space, chance = BOX[kind](), np.random.default_rng(0)
    found, reasons = 0, list[str]()
    for _ in range(60):
        config = at_shares(space.parameters, map(float, chance.random(len(space.parameters))))
        check(space.parameters, config)
        try:
            candidate = space.candidate(config)
        except InvalidConfig as error:
            reasons.append(str(error))
            continue
        found += 1
        assert candidate.parameters == BoundGraft(parse(candidate.peft), SMOLLM2).parameters > 0
        assert space.most is None or candidate.parameters <= space.most
        assert candidate.learning_rate > 0
    assert found >= 10
    assert all(re.search(EXPECTED, reason) for reason in reasons), reasons


@pytest.mark.parametrize("method", [name for name, one in methods().items() if one.searched])
def test_the_default_of_a_searched_argument_lies_in_its_range(method: str) -> None:
    declared = find(method)
    for name, one in declared.searched.items():
        default = declared.arguments[name].default
        numbers = [value for value in one.values if not isinstance(value, str)]
        assert default in one.values or min(numbers) <= default <= max(numbers), name


def test_every_method_that_can_train_alone_is_in_the_space_of_the_whole_registry() -> None:
    space = which(SMOLLM2)
    left_out = set(methods()) - {term.method for term in space.terms}
    quantised = {"loftq", "qlora"}
    over_others = {"bitdelta", "from", "fusion", "ipt", "meteora", "o-lora", "output-gated-loras", "spot"}
    assert left_out == quantised | over_others | {"mezo", "elastic"}
    assert space.parameters[0] == Choice("method", len(space.terms))


def test_the_rate_of_the_whole_registry_is_a_factor_on_the_methods_own() -> None:
    space = which(SMOLLM2, only=("prefix", "lora"))
    config = {"method": 0, "prefix": 3, "learning_rate": 1.0}
    assert (space.candidate(config).peft, space.candidate(config).learning_rate) == ("prefix(8)", 5e-3)
    assert space.learning_rate == RELATIVE


def test_the_registry_can_be_filtered_by_family_and_by_merging() -> None:
    space = which(SMOLLM2, family="selective", merges=True)
    assert {term.method for term in space.terms} >= {"bitfit", "shira", "diff-pruning"}
    assert all(mergeable(parse(term.method)) for term in space.terms)
    with pytest.raises(SpecError, match="family: 'additve' is unknown; choices: additive"):
        which(SMOLLM2, family="additve")


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (lambda: which(SMOLLM2, only=("qlora",)), "qlora trains beside a quantised backbone"),
        (lambda: which(BERT, only=("lora", "lpt")), "rows that enter at a layer would read the input there"),
        (lambda: autopeft(SMOLLM2, most=100), "most: no graft of the space has at most 100 .* the smallest has 384"),
        (lambda: s4_space(SMOLLM2, most=1_000), "most: no graft of S4's space"),
        (lambda: positions(SMOLLM2, most=100), "most: no position has at most 100"),
        (lambda: nls(SMOLLM2, at="attn.kv"), "space: the backbone refuses lora.*attn.kv"),
        (lambda: nls(SMOLLM2, groups=31), "groups: 31 is not between 1 and the backbone's 30 layers"),
        (lambda: nls(SMOLLM2, most=1_000), "the smallest has"),
    ],
)
def test_a_space_that_is_empty_says_which_limit_or_method_makes_it_so(
    build: Callable[[], AnySpace], wrong: str
) -> None:
    with pytest.raises(SpecError, match=wrong):
        build()


def test_noahs_modules_stand_up_to_the_depth_of_their_kind() -> None:
    space = noah(SMOLLM2, depths=3)
    config = {
        "lora.depth": 2,
        "serial.depth": 0,
        "prefix.depth": 1,
        "lora_0_9": 0,
        "lora_10_19": 2,
        "prefix_0_9": 1,
        "learning_rate": 1e-3,
    }
    assert space.candidate(config).peft == "lora(5)@0-9 + lora(50)@10-19 + prefix(10)@0-9"
    names = [parameter.name for parameter in space.parameters if isinstance(parameter, Whole)]
    assert names[:3] == ["lora.depth", "serial.depth", "prefix.depth"]


def test_s4s_space_is_the_papers_four_steps() -> None:
    space = s4_space(SMOLLM2, most=1_000_000)
    counts = [one.high - one.low + 1 for one in space.parameters[:-1] if isinstance(one, Choice | Whole)]
    assert prod(counts) == 5 * 3 * 2**4 * 15**4 and len(STRATEGIES) == 15
    config = space.config(
        grouping="spindle", spending="uniform", strategies=("AL", "AP", "AP" + "B", "PBL"), learning_rate=1e-3
    )
    assert space.candidate(config).peft == s4(SMOLLM2, 1_000_000)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_s4s_groups_hold_all_layers_and_the_budget_goes_to_the_tuned_ones(grouping: str) -> None:
    whole = s4(SMOLLM2, 1_000_000, ("A", "AA"[:1], "A", "A"), grouping=grouping, spending="increasing")
    layers = sorted(layer for term in terms(whole) for layer in term.layers or ())
    assert layers == list(range(30))
    alone = s4(SMOLLM2, 1_000_000, ("A", "", "", ""), grouping=grouping)
    assert 900_000 < BoundGraft(parse(alone), SMOLLM2).parameters <= 1_000_000


def test_a_layer_of_a_higher_group_may_spend_more_when_spending_increases() -> None:
    union = terms(s4(SMOLLM2, 1_000_000, ("A", "A", "A", "A"), spending="increasing"))
    sizes = [int(term.arguments["size"]) for term in sorted(union, key=lambda term: term.layers or ())]
    assert sizes == sorted(sizes) and abs(sizes[3] - 4 * sizes[0]) <= 4


def test_positions_are_taken_by_score_until_the_budget_is_spent() -> None:
    space = positions(SMOLLM2, most=20_000, groups=2)
    low = {parameter.name: 0.1 for parameter in space.parameters[:-1]}
    chosen = {"lora(r=1, at=attn.q)@15-29": 0.9, "bitfit(at=attn.v)@0-14": 0.8}
    assert set(chosen) < set(low)
    found = space.candidate({**low, **chosen, "learning_rate": 1e-3})
    taken = {str(term) for term in terms(found.peft)}
    assert any("lora" in term and "attn.q" in term for term in taken)
    assert 20_000 - min(space.costs.values()) < found.parameters <= 20_000


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "autopeft", "groups": 2, "largest": 8, "longest": 4},
        {"kind": "s4", "most": 20_000},
        {"kind": "noah", "sizes": [2, 4], "depths": 2},
        {"kind": "nls", "ranks": [4, 2]},
        {"kind": "lora_ranks", "largest": 4},
        {"kind": "positions", "most": 3_000, "groups": 2},
        {"kind": "which", "family": "selective"},
        {"kind": "union", "terms": [{"method": "lora", "search": {"r": [2, 4], "at": []}, "fixed": {"alpha": 4}}]},
        {"kind": "union", "groups": 3, "terms": [{"method": "ia3"}, {"method": "prefix", "off": True}]},
    ],
    ids=str,
)
def test_a_space_is_asked_for_as_data_and_kept_as_data(asked: object) -> None:
    space = REQUEST.validate_python(asked).space(SHAPE)
    kept: TypeAdapter[AnySpace] = TypeAdapter(AnySpace)
    assert kept.validate_json(kept.dump_json(space)) == space
    chance = np.random.default_rng(1)
    assert any(_candidate(space, chance) for _ in range(50))


def _candidate(space: AnySpace, chance: np.random.Generator) -> bool:
    try:
        space.candidate(at_shares(space.parameters, map(float, chance.random(len(space.parameters)))))
    except InvalidConfig:
        return False
    return True


def test_a_union_of_searched_and_fixed_arguments() -> None:
    asked = {
        "kind": "union",
        "terms": [{"method": "lora", "search": {"r": [2, 4], "at": []}, "fixed": {"alpha": 4}, "off": True}],
        "learning_rate": [0.5, 2.0],
        "relative_rates": True,
    }
    space = REQUEST.validate_python(asked).space(SHAPE)
    assert isinstance(space, Space) and space.learning_rate == Rates(0.5, 2.0, relative=True)
    config = {"lora.on": 1, "lora.r": 1, "lora.at": 0, "learning_rate": 1.0}
    assert space.candidate(config).peft == "lora(4, at=attn.[qv], alpha=4)"
    with pytest.raises(InvalidConfig, match="off"):
        space.candidate({"lora.on": 0, "learning_rate": 1.0})


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"kind": "nsa"}, "nsa"),
        ({"kind": "autopeft", "learning_rate": [1e-2, 1e-3]}, "learning_rate: 0.01 to 0.001"),
        ({"kind": "union", "terms": []}, "at least 1"),
        ({"kind": "union", "terms": [{"method": "lora", "search": {"rank": []}}]}, "lora has no argument 'rank'"),
        ({"kind": "union", "terms": [{"method": "prefix", "search": {"length": [0]}}]}, "the backbone refuses prefix"),
        ({"kind": "union", "terms": [{"method": "lora", "layers": [3, 1]}]}, "refuses lora.*@3-1: layers: cannot read"),
        ({"kind": "union", "terms": [{"method": "lora", "layers": [0, 6]}]}, "refuses lora.*layers: 6 is not a layer"),
        (
            {"kind": "union", "terms": [{"method": "lora", "search": {"r": [4]}, "fixed": {"r": 8}}]},
            "terms: r of lora is searched and fixed",
        ),
        ({"kind": "union", "terms": [{"method": "ia3"}, {"method": "qlora"}]}, "qlora trains beside a quantised"),
        ({"kind": "union", "terms": [{"method": "ia3"}, {"method": "fusion"}]}, "fusion is made over other grafts"),
        ({"kind": "union", "terms": [{"method": "ia3"}, {"method": "mezo"}]}, "mezo only changes how other methods"),
    ],
    ids=str,
)
def test_a_wrong_request_names_the_field(asked: object, wrong: str) -> None:
    with pytest.raises((ValidationError, SpecError), match=wrong):
        REQUEST.validate_python(asked).space(SHAPE)


def test_a_method_that_needs_something_is_taken_where_it_is_there() -> None:
    def methods_of(term: object, *, quantised: bool) -> list[str]:
        space = REQUEST.validate_python({"kind": "union", "terms": [term]}).space(SHAPE, quantised=quantised)
        assert isinstance(space, Space)
        return [one.method for one in space.terms]

    assert methods_of({"method": "qlora"}, quantised=True) == ["qlora"]
    assert methods_of({"method": "fusion", "fixed": {"of": "a|b"}}, quantised=False) == ["fusion"]


def test_budgets_are_shares_of_the_layers_weights() -> None:
    assert weights(SMOLLM2) == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)

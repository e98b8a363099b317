"""What the points of a space mean."""

from __future__ import annotations

from math import isclose, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import Candidate, Rates, Searched, Space, Term, rates
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.feasible import checked
from polygraft.tuning.spaces.parameters import Config, InvalidConfig, LogUniform, Parameter, Whole
from tests.tuning.standin import SHAPE

BERT_SIZED = ModelShape(arch="llama", layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, vocab=30522)
SPACE = autopeft(SHAPE, groups=3, largest=16, longest=8)


def values_of(parameter: Parameter) -> st.SearchStrategy[int | float]:
    if isinstance(parameter, Whole):
        return st.integers(parameter.low, parameter.high)
    return st.floats(parameter.low, parameter.high)


def configs_of(space: Space) -> st.SearchStrategy[Config]:
    return st.fixed_dictionaries({parameter.name: values_of(parameter) for parameter in space.parameters})


def point(**given: float) -> Config:
    """serial(8) in all layers, but for what is given."""
    off = {"serial": 1, "parallel": 5, "prefix": 4}
    return {**off, "layers_0_1": 1, "layers_2_3": 1, "layers_4_5": 1, "learning_rate": 1e-3, **given}


def test_autopeft_on_a_bert_sized_backbone_has_the_published_sizes_and_count() -> None:
    space = autopeft(BERT_SIZED)
    assert space.terms[0].searched[0].values == (768, 384, 192, 96, 48, 24, 12, 6, 3, 1)
    assert space.parameters[0] == Whole("serial", 0, 10)  # 10: off
    wholes = [parameter for parameter in space.parameters if isinstance(parameter, Whole)]
    assert prod(whole.high - whole.low + 1 for whole in wholes) == 2**12 * 11**3
    assert [type(parameter) for parameter in space.parameters] == [Whole] * 15 + [LogUniform]


def test_a_point_is_a_union_at_the_layers_of_the_mask() -> None:
    config = point(serial=0, parallel=2, prefix=3, layers_2_3=0)
    text = "serial(16)@0-1,4-5 + parallel(4)@0-1,4-5 + prefix(1)@0-1,4-5"
    assert SPACE.candidate(config) == Candidate(text, 1e-3, BoundGraft(parse(text), SHAPE).parameters)


def test_neighbouring_groups_are_joined_and_a_full_mask_is_not_written() -> None:
    assert SPACE.candidate(point(layers_4_5=0)).peft == "serial(8)@0-3"
    assert SPACE.candidate(point()).peft == "serial(8)"


def test_the_learning_rate_has_two_digits_so_that_near_copies_are_equal() -> None:
    assert SPACE.candidate(point(learning_rate=1.2345e-3)).learning_rate == 1.2e-3
    assert SPACE.candidate(point(learning_rate=1.2345e-3)) == SPACE.candidate(point(learning_rate=1.2346e-3))


@given(configs_of(SPACE))
@settings(max_examples=200)
def test_every_configuration_is_a_union_that_parses_or_is_declared_invalid(config: Config) -> None:
    off = all(config[term.name] == len(term.searched[0].values) for term in SPACE.terms)
    out = not any(config[parameter.name] for parameter in SPACE.parameters if parameter.name.startswith("layers_"))
    if off or out:
        with pytest.raises(InvalidConfig, match=r"off|out"):
            SPACE.candidate(config)
    else:
        candidate = SPACE.candidate(config)
        assert candidate.parameters == BoundGraft(parse(candidate.peft), SHAPE).parameters > 0
        assert isclose(candidate.learning_rate, config["learning_rate"], rel_tol=0.05)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 600))
def test_a_mask_covers_every_layer_exactly_once(layers: int, groups: int, largest: int) -> None:
    shape = ModelShape(arch="llama", layers=layers, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)
    space = autopeft(shape, groups=min(groups, layers), largest=largest)
    assert [layer for first, last in space.groups for layer in range(first, last + 1)] == list(range(layers))
    sizes = space.terms[0].searched[0].values
    assert (sizes[0], sizes[-1]) == (largest, 1)


def test_any_method_with_a_size_makes_a_space() -> None:
    space = Space(SHAPE, (Term("lora", "lora", (Searched("r", (4, 8)),)),), rates(["lora"]))
    assert space.candidate({"lora": 1, "learning_rate": 3e-4}).peft == "lora(8)"
    assert space.learning_rate.low < find("lora").learning_rate < space.learning_rate.high


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"serial": 6}, "serial: 6"),
        ({"serial": 0.5}, "serial: 0.5"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"depth": 1}, "depth"),
    ],
)
def test_a_point_outside_the_space_is_invalid_and_named(wrong: Config, named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        SPACE.candidate(point(**wrong))


def test_a_space_that_has_no_grafts_is_refused() -> None:
    with pytest.raises(SpecError, match="groups: 7 is not between 1 and the backbone's 6 layers"):
        autopeft(SHAPE, groups=7)
    with pytest.raises(SpecError, match="largest: 0"):
        autopeft(SHAPE, largest=0)
    with pytest.raises(SpecError, match="unknown method 'lorra'"):
        checked(Space(SHAPE, (Term("lorra", "lorra"),), Rates(1e-4, 1e-3)))
    with pytest.raises(SpecError, match=r"learning_rate: 0\.01 to 0\.001 is not a range"):
        Rates(1e-2, 1e-3)

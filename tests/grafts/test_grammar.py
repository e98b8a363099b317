"""What users write for a graft: unions, PEFT configs, and the message that each mistake gets."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.grafts.grammar import learning_rate, parse
from polygraft.grafts.methods.registry import find, methods
from polygraft.grafts.sites import mergeable
from polygraft.grafts.spec import KV, Affine, Branch, GraftSpec, SpecError

LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"]}


def test_a_union_is_its_terms_slots_in_order() -> None:
    spec = parse(" prefix(10) + parallel(64)@0-2,5 +lora(r=4, at=attn.*)")
    assert spec.slots == (
        KV(length=10),
        Branch(at="ffn.out", rank=64, scale=4.0, act="relu", layers=(0, 1, 2, 5)),
        Branch(at="attn.*", rank=4, scale=4.0),
    )
    assert spec.method == "prefix(10) + parallel(64)@0-2,5 +lora(r=4, at=attn.*)"
    assert spec.prefix_length == 10


WAYS = ("elastic", "from", "mezo")  # how a graft starts or is trained, and not what it is


def test_arguments_are_by_place_by_name_or_left_out() -> None:
    assert parse("lora(4, 8)").slots == parse("lora(alpha=8, r=4)").slots
    assert parse("lora").slots == parse("lora()").slots == (Branch(at="linear", rank=8, scale=2.0),)


@pytest.mark.parametrize("name", methods())
def test_every_method_builds_from_its_name_alone_and_survives_json(name: str) -> None:
    spec = parse(f"lora + {name}" if name in WAYS else name)
    assert GraftSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["cannot read ''"]),
        ("lora +", ["cannot read ''"]),
        ("lora lora", ["'lora'", "expected +"]),
        ("lora(r=4", ["(r=4", "expected +"]),
        ("lorax", ["'lorax'", f"choices: {', '.join(methods())}"]),
        ("lora(rank=4)", ["'rank'", "choices: r, alpha, at, dropout"]),
        ("lora(4, r=4)", ["'r' is given twice"]),
        ("lora(r=four)", ["lora.r", "'four' is not an integer"]),
        ("lora(r=0)", ["rank: 0"]),
        ("lora(alpha=big)", ["lora.alpha", "'big' is not a number"]),
        ("lora(alpha=nan)", ["lora.alpha", "'nan' is not a number"]),
        ("lora(dropout=1)", ["dropout: 1.0 is outside [0, 1)"]),
        ("lora(1, 2, linear, 0, 5)", ["lora takes at most 4 arguments: r, alpha, at, dropout"]),
        ("serial(8, selu)", ["'selu' is not an activation; choices: identity, relu, gelu, silu, tanh"]),
        ("prefix(0)", ["prefix length: 0"]),
        ("prefix(2) + prefix(3)", ["two prefixes"]),
        ("lora@3-1", ["layers: cannot read '3-1'"]),
        ("lora@0-99999", ["layers: cannot read '0-99999'"]),
        ("ia3(at=, feedforward=)", ["empty union"]),
        ("lora" + " " * 2000, ["characters; at most 2000"]),
        ("{", ["cannot read '{'"]),
        ("trainable-tokens(²)", ["ids: '²' are not numbers"]),
        ("cpt(ids=²)", ["cpt.ids: '²' are not numbers"]),
        ("lora@10000", ["layers: cannot read '10000'"]),
    ],
)
def test_a_mistake_is_named_with_the_choices(text: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("kind", "digits"), [(int, 10), (int, 1500), (float, 40), (float, 1500)])
def test_numbers_that_no_model_has_are_refused_by_every_method(kind: type, digits: int) -> None:
    """More than 2**31 - 1, or than float32 holds."""
    for name in methods():
        for key, argument in find(name).arguments.items():
            for sign in ("", "-") if argument.annotation is kind else ():
                with pytest.raises(SpecError, match=rf"{name}\.{key}: '{sign}9+' is out of bounds; give an? "):
                    parse(f"{name}({key}={sign}{'9' * digits})")


@given(st.text(alphabet='lora(r=4,)@0-9 +.*|{}":', max_size=40))
def test_no_text_does_worse_than_a_spec_error(text: str) -> None:
    with suppress(SpecError):
        parse(text)


def test_a_union_starts_from_the_smallest_of_its_methods_rates() -> None:
    bitfit, both, lora = (learning_rate(parse(text)) for text in ("bitfit", "bitfit + lora(r=4)@1", "lora"))
    assert bitfit > both == lora


def test_an_affine_is_out_of_a_branch_and_a_prefix_never_merges() -> None:
    assert mergeable(parse("lora + ia3 + bitfit")) and mergeable(parse("dora"))
    assert not any(mergeable(parse(text)) for text in ("prefix", "serial", "parallel", "lora + prefix(1)"))
    assert all(isinstance(slot, Affine) for slot in parse("ia3").slots)

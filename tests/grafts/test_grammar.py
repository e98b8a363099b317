"""What users write for a graft: unions, PEFT configs, and the message that each mistake gets."""

from __future__ import annotations

import json
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.grafts.grammar import from_peft_config, learning_rate, parse
from polygraft.grafts.methods.registry import find, methods
from polygraft.grafts.spec import KV, Affine, Branch, GraftSpec, Norm, SpecError

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


WAYS = ("from", "mezo")  # how a graft starts or is trained, and not what it is


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
        ("{", ["not JSON at character 1"]),
        ('{"a":' + "[" * 1900, ["not JSON", "recursion"]),
        ('{"a":' + "[" * 40 + "]" * 40 + "}", ["a: lists and objects lie in each other more than 32 deep"]),
        ('{"auto_mapping": 1e999}', ["auto_mapping: is a number past"]),
        (r'{"auto_mapping": "\ud800"}', ["auto_mapping: holds half of a surrogate pair"]),
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
    try:
        parse(text)
    except SpecError:
        pass


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "lora(r=8, alpha=8)"),
        (LLAMA, "lora(r=4, alpha=6, at=q_proj|v_proj)"),
        ({**LLAMA, "use_rslora": True, "lora_dropout": 0.1}, "rslora(r=4, alpha=6, at=q_proj|v_proj, dropout=0.1)"),
        ({**LLAMA, "use_dora": True, "layers_to_transform": [0, 3]}, "dora(r=4, alpha=6, at=q_proj|v_proj)@0,3"),
        ({**LLAMA, "layers_to_transform": 2}, "lora(r=4, alpha=6, at=q_proj|v_proj)@2"),
        ({"peft_type": "IA3"}, "ia3"),
        ({"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"]}, "ia3(at=k_proj, feedforward=down_proj)"),
        (
            {"peft_type": "IA3", "target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
            "ia3(at=k_proj, feedforward=up_proj)",
        ),
        ({"peft_type": "IA3", "target_modules": "k_proj", "feedforward_modules": []}, "ia3(at=k_proj, feedforward=)"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7, "token_dim": 64, "num_layers": 2}, "prefix(7)"),
        (
            {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 9},
            "prefix-mlp(20, hidden=9)",
        ),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 7, "encoder_hidden_size": 9}, "p-tuning(7, hidden=9)"),
        ({**LLAMA, "init_lora_weights": "pissa"}, "pissa(r=4, alpha=6, at=q_proj|v_proj)"),
        ({"peft_type": "VERA", "r": 16, "target_modules": ["q_proj"]}, "vera(r=16, at=q_proj)"),
        ({"peft_type": "OFT", "use_cayley_neumann": False, "target_modules": "q_proj"}, "oft(neumann=0, at=q_proj)"),
        ({"peft_type": "MISS", "init_weights": "bat", "r": 8, "target_modules": "all-linear"}, "bat(8, at=all-linear)"),
    ],
)
def test_a_peft_config_means_what_it_means_in_peft(config: dict[str, object], text: str) -> None:
    found = parse(json.dumps(config))
    assert found.slots == parse(text).slots
    assert parse(found.method).slots == found.slots


def test_dora_with_a_rank_stabilised_scale_keeps_it() -> None:
    branch, norm = from_peft_config({**LLAMA, "use_dora": True, "use_rslora": True}).slots
    assert isinstance(branch, Branch) and isinstance(norm, Norm)
    assert branch.scale == pytest.approx(6 / sqrt(4), rel=1e-15)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "XLORA"}, ["'XLORA'", "choices: ADALORA, ADAMSS, ADAPTION_PROMPT, ", "VERA"]),
        ({"rank": 4}, ["{'rank': 4}", "Fields: ", "lora_alpha", " r,"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"bias": "all"}, ["{'bias': 'all'}"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern"]),
        ({"r": "many"}, ["lora.r", "'many'"]),
        ({"r": 0}, ["rank: 0"]),
        ({"layers_to_transform": "0"}, ["layers_to_transform: '0'"]),
        ({"layers_to_transform": []}, ["layers_to_transform: []"]),
        ({"layers_to_transform": [True]}, ["layers_to_transform: [True]"]),
        ({"layers_to_transform": [-1]}, ["layers_to_transform: [-1]"]),
        ({"peft_type": "WAVEFT", "wavelet_family": "db2"}, ["wavelet_family: 'db2'", "WAVEFT", "'db1'"]),
        ({"peft_type": "VERA", "projection_prng_key": 3}, ["projection_prng_key"]),
    ],
)
def test_a_peft_field_that_is_not_read_is_refused(config: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        from_peft_config(config)
    for word in words:
        assert word in str(caught.value)


def test_what_peft_itself_writes_beside_is_passed_over() -> None:
    notes = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "inference_mode": True, "bias": "none"}
    empty = {"alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True, "megatron_core": "megatron.core"}
    assert from_peft_config({**LLAMA, **notes, **empty}) == from_peft_config(LLAMA)


def test_a_union_starts_from_the_smallest_of_its_methods_rates() -> None:
    bitfit, both, lora, config, ia3 = (
        learning_rate(parse(text)) for text in ("bitfit", "bitfit + lora(r=4)@1", "lora", '{"peft_type": "IA3"}', "ia3")
    )
    assert bitfit > both == lora
    assert config == ia3


def test_an_affine_is_out_of_a_branch_and_a_prefix_never_merges() -> None:
    assert parse("lora + ia3 + bitfit").mergeable and parse("dora").mergeable
    assert not any(parse(text).mergeable for text in ("prefix", "serial", "parallel", "lora + prefix(1)"))
    assert all(isinstance(slot, Affine) for slot in parse("ia3").slots)

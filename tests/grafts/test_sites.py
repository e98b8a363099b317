"""Where a slot acts: names, patterns, layers, and what may not meet at one site."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import CROSS, LINEAR, ModelShape, Site, module_path, resolve, sublayers
from polygraft.grafts.spec import Affine, Branch, GraftSpec, Norm, SpecError

ONE_STACK = [name for name in LINEAR if name not in CROSS]
SHAPE = ModelShape("llama", layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}


def names(at: str) -> list[str]:
    return [site.name for site in resolve(Branch(at=at, rank=1, layers=(0,)), SHAPE)]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("linear", ONE_STACK),
        ("all-linear", ONE_STACK),
        ("attn.*", ["attn.q", "attn.k", "attn.v", "attn.o"]),
        ("attn.[qv]|ffn.down", ["attn.q", "attn.v", "ffn.down"]),
        ("ffn.down|attn.q", ["attn.q", "ffn.down"]),
        ("q_proj|mlp.up_proj", ["attn.q", "ffn.up"]),
        ("*.out", ["attn.out", "ffn.out"]),
        ("attn.q|attn.*", ["attn.q", "attn.k", "attn.v", "attn.o"]),
    ],
)
def test_a_pattern_means_sites_in_one_order(at: str, expected: list[str]) -> None:
    assert names(at) == expected


def test_sublayers_are_named_never_meant_by_a_star() -> None:
    assert sublayers("linear|attn.*|q_proj") == ()
    assert sublayers("ffn.out|attn.*") == ("ffn.out",)


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        (Branch(at="attn.x", rank=1), ["'attn.x'", "sites: attn.q, attn.k", "attn.out, ffn.out"]),
        (Branch(at="attn.q|embed", rank=1), ["'embed'"]),
        (Branch(at="attn.q", rank=1, tap="output"), ["'attn.q'", "sites: attn.out, ffn.out"]),
        (Affine(at="norm.1", scale=True, shift=False, side="in"), ["'norm.1'", "sites: attn.q"]),
        (Norm(at="ffn.out"), ["'ffn.out'", "op 'norm'"]),
        (Branch(at="linear", rank=1, layers=(0, 3)), ["layers: 3", "0-2"]),
    ],
)
def test_a_target_that_is_nothing_is_an_error_that_lists_the_sites(slot: Branch, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(slot, SHAPE)
    for word in words:
        assert word in str(caught.value)


def test_layers_are_each_taken_once_in_order() -> None:
    assert resolve(Branch(at="attn.q", rank=1, layers=(2, 0, 2)), SHAPE) == (Site(0, "attn.q"), Site(2, "attn.q"))
    assert len(resolve(Branch(at="attn.q", rank=1), SHAPE)) == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lora + dora", "DoRA's norm"),
        ("dora + dora@0", "DoRA's norm"),
        ("ia3 + ia3(at=attn.*)", "two scales"),
        ("bitfit + bitfit(at=attn.q)@1", "two shifts"),
        ("lora(dropout=0.1) + lora(r=2, at=attn.q)", "dropout"),
    ],
)
def test_slots_that_mean_nothing_together_are_refused_by_site(text: str, word: str) -> None:
    with pytest.raises(SpecError, match=word) as caught:
        BoundGraft(parse(text), SHAPE)
    assert "attn." in str(caught.value)


def test_a_norm_needs_a_linear_branch_of_its_own_graft() -> None:
    with pytest.raises(SpecError, match=r"0.attn.q has no branch"):
        BoundGraft(GraftSpec("x", (Norm(at="attn.q"),)), SHAPE)
    with pytest.raises(SpecError, match="DoRA's norm"):
        BoundGraft(GraftSpec("x", (Branch(at="attn.q", rank=1, act="relu"), Norm(at="attn.q"))), SHAPE)


@pytest.mark.parametrize(
    "text",
    ["lora + ia3 + bitfit + parallel + serial + prefix", "lora(r=2) + lora(r=4)", "dora(at=attn.*) + lora(at=ffn.*)"],
)
def test_slots_that_add_up_may_share_a_graft(text: str) -> None:
    assert BoundGraft(parse(text), SHAPE)


def test_the_shape_is_read_from_a_transformers_config() -> None:
    assert ModelShape.from_config(CONFIG) == SHAPE
    assert ModelShape.from_config({**CONFIG, "head_dim": 32}).kv_width == 64
    assert module_path(Site(2, "ffn.down"), SHAPE) == "layers.2.mlp.down_proj"


def test_an_example_may_be_as_long_as_positions_are_left_beside_the_graft() -> None:
    shape = ModelShape.from_config({**CONFIG, "max_position_embeddings": 512})
    shape.check_length(502, 10)
    with pytest.raises(SpecError, match=r"max_length: 503 tokens and the 10 .* 512 positions; at most 502"):
        shape.check_length(503, 10)
    SHAPE.check_length(1 << 20, 10)  # a config that names no limit


@pytest.mark.parametrize(("arch", "positions"), [("gpt2", 512), ("opt", 512), ("llama", 512), ("roberta", 510)])
def test_the_positions_of_an_architecture_are_those_of_its_config(arch: str, positions: int) -> None:
    config = AutoConfig.for_model(arch, **{"max_position_embeddings": 512, "n_positions": 512}).to_dict()
    assert ModelShape.from_config(config).positions == positions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "supported: bert, gemma, gemma2, "]),
        ({"hidden_size": "big"}, ["hidden_size: 'big'"]),
        ({"vocab_size": None}, ["vocab_size: None"]),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, ["'dynamic'"]),
    ],
)
def test_a_backbone_without_sites_or_sizes_is_named(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        ModelShape.from_config({**CONFIG, **change})
    for word in words:
        assert word in str(caught.value)

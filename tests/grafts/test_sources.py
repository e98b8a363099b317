"""What a graft may take of others, told from their specs alone; and that equal experts are the one graft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse, pinned
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sources import Source, check
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.test_merge import unmerged

SHAPE = ModelShape("llama", layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=12, vocab=10)


@pytest.mark.parametrize(
    ("text", "member", "wrong"),
    [
        ("meteora(r=4, of=a)", "serial(4)", "'a' is 'serial\\(4\\)', not a LoRA"),
        ("meteora(r=4, of=a)", "molora(r=4)", "not a LoRA"),
        ("meteora(r=4, at=attn.q, of=a)", "lora(r=4, at=attn.[qv])", "'a' also acts at 0.attn.v"),
        ("meteora(r=4, of=a)", "lora(r=8)", "'a' has rank 8 at 0.attn.q, more than 4"),
        ("o-lora(r=4, old=4, of=a)", "prefix(4)", "not a LoRA"),
        ("o-lora(r=1, old=100000, of=a|b)", "lora(r=4)", "old: 100000 is more than the largest rank of 'a.b'; give 4"),
        ("fusion(4, of=a)", "serial(4)", "'a' also acts at 0.attn.out"),
        ("fusion(4, of=a)", "serial(4, act=relu, at=ffn.out)", "not an adapter with gelu"),
        ("fusion(4, of=a)", "serial(4, at=ffn.out, bias=1)", "no biases"),
        ("spot(4, of=a)", "prompt(5)", "'a' is 'prompt\\(5\\)', from which no 'spot"),
        ("lora(r=4) + from(of=a)", "lora(r=4, alpha=1)", "from which no"),
        ("lora(r=2) + from(of=a)", "lora(r=4)", "from which no"),
        ("lora(r=9) + from(of=a)", "lora(r=8) + elastic", "at 0.attn.q it has .8, 8., not A .9, 8."),
        ("serial(2) + from(of=a)", "lora(r=8) + elastic", "at 0.attn.out it has nothing of the kind"),
        ("ipt(4, of=a|b)", "prompt(5)", "not a prompt of 4 rows alone"),
        ("ipt(4, of=a|b)", "lora", "without a prompt"),
    ],
)
def test_a_graft_that_does_not_give_what_is_taken_is_refused(text: str, member: str, wrong: str) -> None:
    graft = BoundGraft(parse(text), SHAPE)
    with pytest.raises(SpecError, match=wrong):
        check(graft, {name: BoundGraft(parse(member), SHAPE) for name in graft.spec.sources})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("meteora(of=A b)", "of: 'A b' is not a graft's name"),
        ("spot(of=)", "it is empty"),
        ("meteora(r=64, of=a|b|a)", "of: 'a' is named 2 times"),
        ("ipt(d=2, of=a|b)", "d: 2 dimensions of 2 prompts"),
        ("meteora(8, linear, 2, a|b)", "meteora takes at most 3 arguments"),
    ],
)
def test_text_that_names_no_grafts_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        assert parse(text).sources


def test_dropout_and_starts_do_not_hinder_going_on() -> None:
    pairs = {"lora(r=4, dropout=0.2) + from(of=a)": "lora(r=4)", "spot(4, of=a)": "prompt(4, start=vocabulary)"}
    for text, member in pairs.items():
        check(BoundGraft(parse(text), SHAPE), {"a": BoundGraft(parse(member), SHAPE)})


def test_names_become_versions_and_nothing_else_changes() -> None:
    text = "meteora(r=4, of= a|b@2 , top=1)@0 + spot(5, of=a)"
    versions = {"a": "a@3", "b@2": "b@2"}
    assert pinned(text, versions) == "meteora(r=4, of=a@3|b@2, top=1)@0 + spot(length=5, of=a@3)"
    assert parse(pinned(text, versions)).sources == ("a@3", "b@2")
    assert pinned("lora(r=4, at=a)", versions) == "lora(r=4, at=a)"


@pytest.mark.parametrize("text", ["meteora(r=2, top=0, of=a|a@2)", "output-gated-loras(r=2, of=a|a@2)"])
def test_equal_experts_are_the_one_lora_whatever_the_gate_says(text: str, tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float64)
    graft = BoundGraft(parse(text), backbone.shape)
    lora = BoundGraft(parse("lora(r=2, alpha=4)"), backbone.shape)
    member = random_tensors(lora, 0)
    sources = {name: Source(lora, member) for name in graft.spec.sources}
    values = initialise(graft, backbone, seed=1, samples=(), sources=sources)
    values = {n: torch.randn_like(v) if n.endswith((".G", ".e")) else v for n, v in values.items()}
    ids = torch.arange(4, 24)
    assert relative(unmerged(graft, values, backbone, ids), unmerged(lora, member, backbone, ids)) < 1e-12
    assert graft.parameters == sum(v.numel() for n, v in values.items() if n.endswith((".G", ".e")))

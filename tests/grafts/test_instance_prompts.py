"""Prompts that read the whole input: what is said of them, what is refused, and where their input ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.catalogue import entry
from polygraft.grafts.formats.plain import plain
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.registry import find, methods
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import SpecError, Tokens
from polygraft.kernels.common.noise import normal
from tests.grafts.oracle.row import random_tensors


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64)


def states(backbone: Backbone, text: str, ids: list[int], prompt: int) -> torch.Tensor:
    """Hidden states of the tokens `ids`, the first `prompt` of which are the input."""
    graft = BoundGraft(parse(text), backbone.shape)
    virtual, prefix = graft.virtual_length, graft.prefix_length
    count = virtual + len(ids)
    rows = Rows(
        torch.tensor([*virtual_ids(virtual), *ids]),
        torch.arange(count) + prefix,
        (Span(0, count, 0),),
        inputs=(Input(virtual, virtual + prompt),) if prompt else (),
    )
    stacks = backbone.stacks([Resident("r", graft, random_tensors(graft, seed=1))])
    return backbone.forward(rows, stacks, WholeSequences(((0, count),), backbone.shape))[virtual:]


def test_the_catalogue_says_that_these_alone_depend_on_where_the_prompt_ends() -> None:
    entries = [entry(method) for method in methods().values()]
    reading = {one.name for one in entries if one.recompute_needs_prompt_len}
    assert reading == {"idpg", "smop", "direft", "loreft", "noreft"}
    assert {one.name for one in entries if not one.chunkable} == {"idpg", "smop"}
    assert {one.name for one in entries if not one.prefix_cacheable} == reading
    assert not parse("prompt(5) + lora").reads_prompt and parse("lora + smop").reads_prompt
    assert entry(find("smop")).slots == ("tokens highest",) and entry(find("idpg")).slots == ("tokens relu",)


@pytest.mark.parametrize("text", ["smop(3, k=3)", "idpg(3, hidden=6)", "prefix(2) + idpg(2, hidden=9) + lora(r=2)"])
def test_what_follows_the_input_does_not_change_what_stands_before_it(text: str, backbone: Backbone) -> None:
    ids = [7, 300, 41, 12, 99, 5, 230]
    whole = states(backbone, text, ids, prompt=4)
    assert torch.equal(whole[:4], states(backbone, text, ids[:4], prompt=4)[:4])
    assert not torch.equal(whole, states(backbone, text, ids, prompt=5))
    assert not torch.equal(whole[0], states(backbone, text, [*ids[:3], 13], prompt=4)[0]), "the first row sees all"


def test_virtual_tokens_without_their_input_are_an_error(backbone: Backbone) -> None:
    with pytest.raises(SpecError, match="inputs: 0"):
        states(backbone, "smop(3)", [5, 6, 7], prompt=0)


def test_what_makes_no_sense_is_refused() -> None:
    for arguments, said in (
        ({"gate": "relu", "mode": "add"}, "whole prompts before"),
        ({"experts": 2}, "without a gate"),
        ({"gate": "relu", "experts": 2, "noise": 1.0}, "noise"),
        ({"gate": "highest", "experts": 0}, "at least 1"),
    ):
        with pytest.raises(SpecError, match=said):
            Tokens(length=2, **arguments)
    for text, said in (
        ("smop(k=1)", "at least 2"),
        ("idpg(hidden=0)", "hidden"),
        ("smop + prompt", "two prompts"),
    ):
        with pytest.raises(SpecError, match=said):
            parse(text)


def test_one_of_many_prompts_is_not_exported_as_the_one_of_prompt_tuning(backbone: Backbone) -> None:
    assert plain(BoundGraft(parse("prompt(5)"), backbone.shape), None) is not None
    assert plain(BoundGraft(parse("smop(5)"), backbone.shape), None) is None


def test_noise_is_gaussian_and_a_function_of_its_key() -> None:
    z = normal(-5, 20_000, torch.float64)
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03 and abs(float((z**3).mean())) < 0.1
    assert torch.equal(z[:4], normal(-5, 4, torch.float64)) and not torch.equal(z, normal(-4, 20_000, torch.float64))

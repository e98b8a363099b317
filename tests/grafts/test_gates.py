"""What a gate may be asked for, and where it may stand."""

from __future__ import annotations

import pytest

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape, mergeable
from polygraft.grafts.spec import KV, Branch, Norm, SpecError

SHAPE = ModelShape("llama", layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=12, vocab=10)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("molora(experts=0)", "experts: 0"),
        ("molora(experts=2, top=3)", "top: 3 of 2 experts"),
        ("job-gated-experts(r=9, experts=4)", "4 do not share rank 9"),
    ],
)
def test_experts_that_cannot_be_are_refused(text: str, wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        parse(text)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"experts": 2}, "without a gate; choose sigmoid, softmax or attention"),
        ({"gate": "softmax", "experts": 3}, "3 do not share rank 4"),
        ({"gate": "sigmoid", "experts": 2, "top": 1}, "a softmax chooses"),
        ({"gate": "sigmoid", "dropout": 0.1}, "no dropout"),
        ({"gate": "sigmoid", "bias": True}, "no bias"),
        ({"gate": "noise", "act": "relu"}, "takes 1 and 'identity'"),
    ],
)
def test_a_branch_says_which_gate_it_cannot_have(fields: dict[str, object], wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        Branch(at="linear", rank=4, **fields)  # type: ignore[arg-type]


def test_a_gated_branch_is_no_lora_for_a_norm_and_is_not_merged() -> None:
    spec = parse("molora(r=2, at=attn.q)")
    assert not mergeable(spec) and mergeable(parse("job-gated-experts(at=attn.q)"))
    with pytest.raises(SpecError, match="norm rescales one lora"):
        BoundGraft(type(spec)("x", (*spec.slots, Norm(at="attn.q"))), SHAPE)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"gate": "sigmoid"}, "set aside"),
        ({"gate": "sigmoid", "aside": True, "experts": 3}, "3 with gate 'sigmoid' do not share 4 rows"),
        ({"aside": True, "experts": 2}, "2 with gate 'none'"),
    ],
)
def test_prefix_rows_say_which_gate_they_cannot_have(fields: dict[str, object], wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        KV(length=4, **fields)  # type: ignore[arg-type]

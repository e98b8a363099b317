"""A spec bound to a shape: what follows from the two is derived once, and not at all where it means nothing."""

from __future__ import annotations

import pytest

from polygraft.grafts import bound
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape, Site, sites_of
from polygraft.grafts.spec import GraftSpec, SpecError
from tests.tiny import TINY


def test_places_are_resolved_once_for_everything_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[GraftSpec] = []

    def counted(spec: GraftSpec, shape: ModelShape) -> tuple[tuple[int, Site], ...]:
        calls.append(spec)
        return sites_of(spec, shape)

    monkeypatch.setattr(bound, "sites_of", counted)
    graft = BoundGraft(parse("vera(r=4) + prefix(3)@1 + prompt(2)"), TINY)
    for _ in range(2):
        assert (graft.prefix_length, graft.virtual_length, graft.context_length) == (3, 2, 5)
        assert graft.prefix_layers == (1,) and not graft.draws and not graft.reads_prompt
        assert graft.parameters == sum(tensor.numel for tensor in graft.trained)
        assert graft.parameters + graft.frozen == sum(tensor.numel for tensor in graft.tensors)
        assert {index for index, _ in graft.sites} == {operand.slot for operand in graft.operands} == {0, 1, 2}
    assert calls == [graft.spec]


def test_grafts_of_one_spec_and_shape_are_equal() -> None:
    one, other = (BoundGraft(parse("lora(r=2)"), TINY) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != BoundGraft(parse("lora(r=3)"), TINY)


def test_served_its_operands_are_its_tensors() -> None:
    graft = BoundGraft(parse("vera(r=4, at=attn.q) + mezo"), TINY)
    assert [tensor.name for tensor in graft.plain.tensors] == [operand.name for operand in graft.operands]
    assert graft.plain.shape == TINY and not graft.plain.spec.hooks


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("lora@9", "9 is not a layer"), ("lora(at=cross.q)", "matches no site"), ("oft(b=7)", "size: 7")],
)
def test_a_graft_that_means_nothing_on_a_shape_is_not_bound(text: str, wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        BoundGraft(parse(text), TINY)


def test_rows_through_the_layers_need_a_decoder() -> None:
    bert = ModelShape("bert", layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=512)
    with pytest.raises(SpecError, match="rows that enter at a layer would read the input there"):
        BoundGraft(parse("lpt(3)@1"), bert)

"""Residency: a byte budget kept by letting go of what nobody uses, and stacks that outlive the streams that leave."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.serving.residency import GraftUnusable, Residency
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

IA3 = parse("ia3")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


def named(backbone: Backbone, id: str) -> Resident:
    graft = BoundGraft(IA3, backbone.shape)
    return Resident(id, graft, random_tensors(graft, 0))


def size(backbone: Backbone) -> int:
    return sum(4 * value.numel() for value in named(backbone, "x").tensors.values())


def holding(backbone: Backbone, *ids: str, room: int = 8) -> Residency:
    residency = Residency(folder=Path("/nowhere"), backbone=backbone, budget_bytes=room * size(backbone))
    for id in ids:
        residency.admit(named(backbone, id), ())
    return residency


def test_the_least_recently_used_graft_that_nobody_uses_goes_first(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", "c", room=3)
    residency.pin(GraftId("a"))  # used now, and still in use
    residency.pin(GraftId("b"))
    residency.unpin(GraftId("b"))  # used later than c
    residency.admit(named(backbone, "d"), ())
    assert residency.held == ("a", "b", "d")
    assert residency.used_bytes == 3 * size(backbone)


def test_grafts_in_use_or_wanted_are_never_let_go(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", room=2)
    residency.pin(GraftId("a"))
    assert not residency.can_admit(named(backbone, "c"), {GraftId("b")})
    assert residency.can_admit(named(backbone, "c"), ())
    with pytest.raises(GraftUnusable, match="bytes"):
        holding(backbone, room=0).can_admit(named(backbone, "c"), ())


def test_a_graft_that_classifies_texts_is_held_with_its_classifier(backbone: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(replace(IA3, head=Head(("a", "b"))), backbone.shape)
    values = random_tensors(graft, 0)
    name = native.save(tmp_path, graft, values, backbone=backbone.fingerprint)
    held = Residency(folder=tmp_path, backbone=backbone, budget_bytes=1 << 30).fetch(GraftId(name))
    assert held.graft.spec.head == Head(("a", "b"))
    assert torch.equal(held.tensors["head.weight"], values["head.weight"].float())


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_graft_in_use_stays_even_when_it_was_used_least_recently(backbone: Backbone, order: tuple[str, str]) -> None:
    residency = holding(backbone, *order, room=2)
    residency.pin(GraftId("a"))
    residency.pin(GraftId("b"))
    residency.unpin(GraftId("b"))  # used later than a, but by nobody now
    residency.admit(named(backbone, "c"), ())
    assert residency.held == ("a", "c")


def test_a_graft_of_two_streams_stays_until_both_have_left(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", room=2)
    residency.pin(GraftId("a"))
    residency.pin(GraftId("a"))
    residency.pin(GraftId("b"))
    residency.unpin(GraftId("a"))
    assert not residency.can_admit(named(backbone, "c"), ())
    residency.unpin(GraftId("a"))
    assert residency.can_admit(named(backbone, "c"), ())
    residency.admit(named(backbone, "c"), ())
    assert residency.held == ("b", "c")


def test_a_graft_that_somebody_waits_for_is_kept_though_nobody_uses_it_yet(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", room=2)
    residency.admit(named(backbone, "c"), {GraftId("a")})
    assert residency.held == ("a", "c")


def test_stacks_at_hand_take_no_more_than_the_budget_but_for_the_ones_in_use(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", "c", room=3)
    whole = residency.compose([GraftId(id) for id in "abc"])
    one = residency.compose([GraftId("a")])
    assert residency.compose([GraftId(id) for id in "abc"]) is not whole  # 4 of 3: the older ones went
    assert residency.compose([GraftId("a")]) is not one
    assert residency.compose([GraftId("a")]) is residency.compose([GraftId("a")])


def test_stacks_are_rebuilt_only_each_time_the_streams_halve(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    stacks = Backbone.stacks

    def counting(self: Backbone, residents: list[Resident]) -> object:
        built.append(len(residents))
        return stacks(self, residents)

    monkeypatch.setattr(Backbone, "stacks", counting)
    ids = [GraftId(id) for id in "hgfedcba"]
    residency = holding(backbone, *ids, room=20)
    for left in range(8, 0, -1):
        composition = residency.compose(ids[:left])
        assert all(composition.stacks.residents[composition.place[id]].id == id for id in ids[:left])
    assert built == [8, 3, 1]
    residency.compose(ids[:6])
    assert built == [8, 3, 1]


def test_of_stacks_at_hand_the_smallest_serve_and_those_used_longest_ago_go(backbone: Backbone) -> None:
    a, b, c = (GraftId(id) for id in "abc")
    residency = holding(backbone, a, b, c, room=3)
    of_a, _, of_c = [residency.compose([id]) for id in (a, b, c)]  # as many bytes as there are
    assert residency.compose([a]) is of_a
    pair = residency.compose([b, c])  # puts two out: those of b and c, since that of a was used later
    assert residency.compose([a]) is of_a and residency.compose([c]) is pair is not of_c
    small = holding(backbone, a, b, room=3)
    of_a, of_both = small.compose([a]), small.compose([a, b])
    assert small.compose([a]) is of_a and small.compose([b]) is of_both


def test_the_bare_backbone_runs_with_the_stacks_of_one_graft_and_not_of_more(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b")
    both = residency.compose([GraftId("a"), GraftId("b")])
    assert residency.compose([]) is not both and residency.compose([]).place == {}
    other = holding(backbone, "a")
    assert other.compose([GraftId("a")]) is other.compose([])


def test_stacks_of_a_graft_that_was_let_go_go_with_it(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", room=2)
    before = residency.compose([GraftId("a"), GraftId("b")])
    residency.admit(named(backbone, "c"), ())
    residency.admit(named(backbone, "a"), ())
    assert residency.held == ("a", "c")
    assert residency.compose([GraftId("a")]) is not before


def test_only_the_composition_in_use_keeps_packed_copies(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b")
    first, second = (residency.compose([GraftId(id)]).stacks for id in "ab")
    for stacks in (first, second):
        stacks.derived("packed", lambda: "copies")

    def left(stacks: Stacks) -> str:
        return stacks.derived("packed", lambda: "none")

    assert left(residency.compose([GraftId("b")]).stacks) == "copies"
    assert residency.compose([GraftId("a")]).stacks is first
    assert left(second) == "none"


def test_a_folder_that_holds_another_graft_or_bad_values_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    residency = Residency(folder=tmp_path, backbone=backbone, budget_bytes=1 << 20)
    graft = BoundGraft(IA3, backbone.shape)
    values = random_tensors(graft, 0)
    id = native.save(tmp_path, graft, values, backbone=backbone.fingerprint)
    assert residency.fetch(GraftId(id)).id == id
    (tmp_path / id).rename(tmp_path / "other")
    with pytest.raises(GraftUnusable, match=id):
        residency.fetch(GraftId("other"))
    values[next(iter(values))][0] = float("nan")
    (tmp_path / "other").rename(tmp_path / id)
    save_file(values, tmp_path / id / "graft.safetensors")
    with pytest.raises(GraftUnusable, match="finite"):
        residency.fetch(GraftId(id))


def test_a_graft_that_just_fits_puts_nobody_out_and_those_that_go_are_counted(backbone: Backbone) -> None:
    residency = holding(backbone, "a", "b", room=3)
    assert residency.can_admit(named(backbone, "c"), {GraftId("a"), GraftId("b")})
    residency.admit(named(backbone, "c"), ())
    assert (residency.held, residency.evictions) == (("a", "b", "c"), 0)
    residency.admit(named(backbone, "d"), {GraftId("a")})
    assert (residency.held, residency.evictions) == (("a", "c", "d"), 1)
    residency.admit(named(backbone, "e"), ())
    assert residency.evictions == 2
    assert holding(backbone, room=1).can_admit(named(backbone, "c"), ())


@pytest.mark.parametrize(("text", "value", "wrong"), [("lora(r=2, alpha=2e38)", 10.0, "1e+38"), ("ia3", 3e38, None)])
def test_a_value_that_is_not_finite_as_it_is_computed_with_is_refused(
    text: str, value: float, wrong: str | None, backbone: Backbone, tmp_path: Path
) -> None:
    """A branch's matrices are multiplied with its scale first."""
    residency = Residency(folder=tmp_path, backbone=backbone, budget_bytes=1 << 20)
    graft = BoundGraft(parse(text), backbone.shape)
    values = {name: torch.full_like(tensor, value) for name, tensor in random_tensors(graft, 0).items()}
    id = native.save(tmp_path, graft, values, backbone=backbone.fingerprint)
    if wrong is None:
        assert residency.fetch(GraftId(id)).id == id
        return
    with pytest.raises(GraftUnusable, match=rf"times {re.escape(wrong)} is not finite in torch.float32"):
        residency.fetch(GraftId(id))

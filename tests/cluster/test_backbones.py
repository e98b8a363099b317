"""The backbones that a service has, as the store keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster import backbones as module
from polygraft.cluster import evolve
from polygraft.cluster.backbones import (
    BadBackboneName,
    Taken,
    add_backbone,
    advance_backbone,
    backbones,
    check_backbone_name,
    is_answering,
    is_used,
    put_backbone,
)
from polygraft.cluster.events import BackboneAsked, BackboneLoading, BackboneRemoved, BackboneUnloading
from polygraft.cluster.model import START, Alias, GraftId, Snapshot, TenantId
from polygraft.cluster.states import IllegalTransition, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import make_backbone

B = make_backbone("b")


def test_what_happens_to_a_backbone_is_in_its_record_and_in_the_snapshot_of_the_log() -> None:
    store = MemoryStore()
    add_backbone(store, B)
    add_backbone(store, make_backbone("c"))
    advance_backbone(store, BackboneAsked(backbone="b", at=5.0))
    advance_backbone(store, BackboneAsked(backbone="b", at=4.0))  # an ingress whose clock is behind
    advance_backbone(store, BackboneLoading(backbone="b", reason=Reason.ASKED, at=6.0))
    advance_backbone(store, BackboneRemoved(backbone="c", at=7.0))
    assert backbones(store) == [replace(B, asked_at=5.0, loaded=True)]
    snapshot = Snapshot()
    for stored in store.events(START):
        snapshot = evolve.apply(snapshot, stored.id, stored.event)
    assert list(snapshot.backbones.values()) == backbones(store)


def test_adding_the_same_again_changes_nothing() -> None:
    store = MemoryStore()
    add_backbone(store, B)
    assert add_backbone(store, replace(B, added_at=9.0)) == B
    assert len(store.events(START)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (replace(B, fingerprint="other"), "name: 'b' is another backbone, /models/b; remove it first"),
        (replace(B, dtype="fp32"), "name: 'b' is another backbone"),
        (make_backbone("c", fingerprint="of-b"), "is the model of the backbone b"),
        (make_backbone("poems"), "name: 'poems' is that of a graft"),
    ],
)
def test_a_name_means_one_model_and_a_model_has_one_name(record: object, message: str) -> None:
    store = MemoryStore()
    add_backbone(store, B)
    alias = Alias(tenant=TenantId("t"), name="poems", version=1, latest=1)
    store.commit([Write(keys.alias(alias.tenant, alias.name), alias, 0)])
    with pytest.raises(Taken, match=message):
        add_backbone(store, record)  # type: ignore[arg-type]


def test_a_service_that_begins_has_its_own_backbone_whatever_was_under_its_name() -> None:
    store = MemoryStore()
    put_backbone(store, replace(B, asked_at=2.0), at=2.0)
    advance_backbone(store, BackboneLoading(backbone="b", reason=Reason.ASKED, at=3.0))
    moved = put_backbone(store, replace(B, folder="/elsewhere", added_at=8.0, asked_at=8.0), at=8.0)
    assert moved == replace(B, folder="/elsewhere", asked_at=8.0, loaded=True)
    changed = replace(B, fingerprint="new", added_at=9.0, asked_at=9.0)
    assert put_backbone(store, changed, at=9.0) == changed and backbones(store) == [changed]


def test_one_that_was_asked_meanwhile_is_not_unloaded() -> None:
    store = MemoryStore()
    put_backbone(store, replace(B, asked_at=2.0), at=2.0)
    advance_backbone(store, BackboneLoading(backbone="b", reason=Reason.ASKED, at=2.0))
    advance_backbone(store, BackboneAsked(backbone="b", at=9.0))
    with pytest.raises(IllegalTransition, match="asked at 9"):
        advance_backbone(store, BackboneUnloading(backbone="b", asked_at=2.0, reason=Reason.IDLE, at=9.1))
    advance_backbone(store, BackboneUnloading(backbone="b", asked_at=9.0, reason=Reason.IDLE, at=99.0))
    assert backbones(store) == [replace(B, asked_at=0.0)]


def test_what_is_not_there_cannot_be_asked() -> None:
    with pytest.raises(IllegalTransition, match="absent"):
        advance_backbone(MemoryStore(), BackboneAsked(backbone="b", at=1.0))


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "x" * 65, "graft@1", "ä"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(BadBackboneName, match="name: "):
        check_backbone_name(name)
    assert check_backbone_name("SmolLM2-135M_instruct.1") == "SmolLM2-135M_instruct.1"


def test_a_backbone_is_answering_while_any_ingress_says_that_it_has_requests_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()

    def say(ingress: str, streams: int, waiting: int = 0) -> None:
        store.append(keys.demand("b"), {"ingress": ingress, "streams": streams, "waiting": waiting})

    assert not is_answering(store, "b")
    say("one", 2)
    say("two", 0, 1)
    say("one", 0)
    assert is_answering(store, "b") and not is_answering(store, "c")
    say("two", 0)
    assert not is_answering(store, "b")
    say("dead", 3)
    assert is_answering(store, "b")
    monkeypatch.setattr(module, "_LATELY_S", -1.0)  # as after a while
    assert not is_answering(store, "b")


def test_a_graft_is_used_while_any_ingress_says_that_it_generates_with_it_for_the_tenant() -> None:
    store, ann = MemoryStore(), TenantId("ann")

    def say(ingress: str, *grafts: str) -> None:
        used: list[JSON] = [["ann", graft] for graft in grafts]
        store.append(keys.demand("b"), {"ingress": ingress, "streams": 1, "waiting": 0, "grafts": used})

    say("one", "poems", "songs")
    say("two", "poems")
    assert is_used(store, "b", ann, GraftId("songs"))
    say("one")
    assert is_used(store, "b", ann, GraftId("poems")) and not is_used(store, "b", ann, GraftId("songs"))
    assert not is_used(store, "b", TenantId("bob"), GraftId("poems")), "whose graft has the same bits waits for nobody"
    assert not is_used(store, "c", ann, GraftId("poems"))

"""Names that move between versions, and versions that go."""

from __future__ import annotations

import pytest

from polygraft.cluster.events import AliasMoved, GraftDeleted
from polygraft.cluster.model import START, Graft, GraftId, TenantId
from polygraft.cluster.publish import UnknownModel, adopt, resolve
from polygraft.cluster.store.memory import MemoryStore
from polygraft.cluster.story import story
from polygraft.cluster.versions import InUse, NoVersionBefore, delete, promote, roll_back, versions

T, U = TenantId("t"), TenantId("u")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def adopted(store: MemoryStore, graft: str = "g", *, promote: bool = False, tenant: TenantId = T) -> Graft:
    return adopt(
        store,
        tenant,
        "tutor",
        graft=GraftId(graft),
        method="ia3",
        backbone_fingerprint="f",
        parameters=5,
        bytes=20,
        context_length=0,
        at=1.0,
        promote=promote,
    )


def meant(store: MemoryStore) -> str:
    graft = resolve(store, T, "tutor")
    assert graft is not None
    return graft.model


def test_a_name_moves_to_any_of_its_versions_and_back(store: MemoryStore) -> None:
    for graft in ("a", "b", "c"):
        adopted(store, graft)
    assert meant(store) == "tutor@1"
    assert promote(store, T, "tutor", 3, at=2.0).id == "c" and meant(store) == "tutor@3"
    assert roll_back(store, T, "tutor", at=3.0).id == "b" and meant(store) == "tutor@2"
    delete(store, T, "tutor", 1, at=4.0)
    with pytest.raises(NoVersionBefore, match="no version before tutor@2"):
        roll_back(store, T, "tutor", at=5.0)
    moved = [one.event.version for one in store.events(START) if isinstance(one.event, AliasMoved)]
    assert moved == [1, 3, 2]


def test_promoting_what_the_name_means_already_changes_nothing(store: MemoryStore) -> None:
    adopted(store)
    before = len(store.events(START))
    assert promote(store, T, "tutor", 1, at=2.0).model == "tutor@1" and len(store.events(START)) == before


def test_the_version_that_a_name_means_goes_last_and_its_number_is_not_given_again(store: MemoryStore) -> None:
    adopted(store)
    adopted(store)
    with pytest.raises(InUse, match="promote another version"):
        delete(store, T, "tutor", 1, at=2.0)
    delete(store, T, "tutor", 2, at=2.0)
    delete(store, T, "tutor", 1, at=2.0)
    assert versions(store, T, "tutor") == []
    for model in ("tutor", "tutor@1", "tutor@2"):
        with pytest.raises(UnknownModel, match=f"'{model}' does not exist"):
            resolve(store, T, model)
    with pytest.raises(NoVersionBefore):
        roll_back(store, T, "tutor", at=3.0)
    assert adopted(store).model == "tutor@3" and meant(store) == "tutor@3"
    gone = [one.event for one in store.events(START) if isinstance(one.event, GraftDeleted)]
    assert [event.version for event in gone] == [2, 1]
    assert story(store, "tutor@2")[-1].endswith("tutor@2 deleted: graft g")


def test_what_is_not_there_or_another_tenants_is_unknown(store: MemoryStore) -> None:
    adopted(store, tenant=U)
    for act in (promote, delete):
        with pytest.raises(UnknownModel):
            act(store, T, "tutor", 1, at=2.0)
    with pytest.raises(UnknownModel):
        roll_back(store, T, "tutor", at=2.0)
    adopted(store)
    for act in (promote, delete):
        with pytest.raises(UnknownModel):
            act(store, T, "tutor", 2, at=2.0)

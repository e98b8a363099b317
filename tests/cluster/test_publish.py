"""Names and versions of grafts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import AliasMoved, GraftPublished, JobCancelled, JobSucceeded
from polygraft.cluster.model import START, FileId, Graft, GraftId, Job, JobId, JobSpec, TenantId
from polygraft.cluster.publish import BadName, UnknownModel, adopt, publish, resolve
from polygraft.cluster.states import IllegalTransition, JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Fenced, Store, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import running

T, U = TenantId("t"), TenantId("u")


@pytest.fixture
def store() -> Store:
    return MemoryStore()


def job_in(store: Store, name: str, *, tenant: str = "t", suffix: str | None = "tutor", promote: bool = False) -> Job:
    spec = JobSpec(backbone="b", training_file=FileId("f"), suffix=suffix, promote=promote)
    job = running(name, tenant=tenant, spec=spec, step=9, trained_tokens=90, loss_before=2.0, loss_after=1.0)
    store.commit([Write(keys.job(job.id), job, 0)])
    return job


def published(store: Store, job: Job, graft: str = "g") -> Graft:
    return publish(
        store,
        job.id,
        graft=GraftId(graft),
        method="lora",
        backbone_fingerprint="f",
        parameters=5,
        bytes=20,
        context_length=0,
        at=7.0,
    )


def test_the_first_version_makes_the_alias_and_ends_the_job(store: Store) -> None:
    graft = published(store, job_in(store, "a"))
    assert (graft.model, graft.job, graft.created_at) == ("tutor@1", "ftjob-a", 7.0)
    job = store.get(keys.job(JobId("ftjob-a"))).value  # type: ignore[union-attr]
    assert (job.state, job.model, job.graft, job.step) == (JobState.SUCCEEDED, "tutor@1", "g", 9)
    kinds = [type(one.event) for one in store.events(START)]
    assert kinds == [JobSucceeded, GraftPublished, AliasMoved]
    assert resolve(store, T, "tutor") == resolve(store, T, "tutor@1") == graft


def test_a_later_version_moves_the_alias_only_when_asked(store: Store) -> None:
    for name, promote, current in (("a", False, 1), ("b", False, 1), ("c", True, 3), ("d", False, 3)):
        published(store, job_in(store, name, promote=promote))
        assert resolve(store, T, "tutor").version == current
    assert [one.value.version for one in store.scan(keys.grafts(T))] == [1, 2, 3, 4]


def test_publishing_again_gives_the_same_version(store: Store) -> None:
    job = job_in(store, "a")
    first = published(store, job)
    events = store.events(START)
    assert published(store, job) == first
    assert store.events(START) == events


def test_a_job_without_a_suffix_is_named_after_itself(store: Store) -> None:
    assert published(store, job_in(store, "a", suffix=None)).model == "ftjob-a@1"


def test_a_job_that_was_cancelled_meanwhile_is_not_published(store: Store) -> None:
    job = job_in(store, "a")
    advance_job(store, JobCancelled(job=job.id, at=5.0))
    with pytest.raises(IllegalTransition):
        published(store, job)
    with pytest.raises(UnknownModel):
        resolve(store, T, "tutor")


def test_a_fenced_worker_publishes_nothing(store: Store) -> None:
    job = job_in(store, "a")
    old = store.acquire("pack/p", "one", 30.0)
    store.acquire("pack/p", "two", 30.0, steal=True)
    assert old is not None
    with pytest.raises(Fenced):
        publish(
            store,
            job.id,
            graft=GraftId("g"),
            method="lora",
            backbone_fingerprint="f",
            parameters=5,
            bytes=20,
            context_length=0,
            at=7.0,
            fence=old.fence,
        )
    assert store.events(START) == []


def test_jobs_that_publish_at_once_get_different_versions(store: Store) -> None:
    jobs = [job_in(store, f"{n}") for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        grafts = list(pool.map(lambda job: published(store, job, f"g-{job.id}"), jobs))
    assert sorted(graft.version for graft in grafts) == list(range(1, 9))
    assert store.get(keys.alias(T, "tutor")).value.latest == 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "model", ["tutor", "tutor@2", "tutor@0", "tutor@", "@1", "", "../x", "a/b@1", "tutor@1@1", "TUTOR"]
)
def test_a_model_that_is_not_there_is_unknown(store: Store, model: str) -> None:
    published(store, job_in(store, "a", tenant="u"))
    with pytest.raises(UnknownModel, match="does not exist"):
        resolve(store, T, model)


def test_another_tenants_model_is_unknown(store: Store) -> None:
    published(store, job_in(store, "a"))
    assert resolve(store, T, "tutor@1")
    with pytest.raises(UnknownModel):
        resolve(store, U, "tutor@1")


def adopted(store: Store, name: str = "tutor", *, promote: bool = False) -> Graft:
    return adopt(
        store,
        T,
        name,
        graft=GraftId("h"),
        method="ia3",
        backbone_fingerprint="f",
        parameters=5,
        bytes=20,
        context_length=0,
        at=7.0,
        promote=promote,
    )


def test_a_graft_made_elsewhere_is_another_version_of_its_name(store: Store) -> None:
    assert adopted(store).model == "tutor@1"
    assert [type(one.event) for one in store.events(START)] == [GraftPublished, AliasMoved]
    published(store, job_in(store, "a"))
    assert adopted(store).model == "tutor@3"
    assert resolve(store, T, "tutor").model == "tutor@1"
    promoted = adopted(store, promote=True)
    assert resolve(store, T, "tutor") == promoted and promoted.job is None


@pytest.mark.parametrize("name", ["", "Tutor", "tutor@1", "a/b", "x" * 65])
def test_a_name_that_no_request_could_give_is_refused(name: str, store: Store) -> None:
    with pytest.raises(BadName, match="name: "):
        adopted(store, name)

"""Which members of a front are trained again, what they came to, and which is chosen."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest

from polygraft.cluster.answers import RemoteGraft, RemoteJob
from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.scores import Scores
from polygraft.cluster.store import keys
from polygraft.cluster.store.memory import MemoryStore
from polygraft.tuning.finals import Final, Interval, Member, chosen, members, retrained
from polygraft.tuning.plan import BadPlan
from polygraft.tuning.record import decode, open_study
from polygraft.tuning.retrain import retrain
from polygraft.tuning.space import Candidate
from polygraft.tuning.study import Result, Trial
from tests.tuning.plans import invented, plan_of

STUDY, EVE = StudyId("study-1"), TenantId("eve")


def trial_of(number: int, parameters: int) -> Trial:
    candidate = Candidate(f"lora({number + 1})", 1e-3, parameters)
    return Trial(number=number, config={}, candidate=candidate, told=0, outcome=Result(values=(2.0, 1.0)))


def member(trial: int, parameters: int, loss: float) -> Member:
    return Member(trial, parameters, loss, 0.0, 1)


def test_of_a_large_front_the_ends_and_evenly_between_are_trained_again() -> None:
    front = [trial_of(number, 10 * (9 - number)) for number in range(9)]
    assert [trial.number for trial in retrained(front, 3)] == [8, 4, 0]
    assert [trial.number for trial in retrained(front[:2], 3)] == [1, 0]


def test_a_member_is_the_mean_of_its_seeds_with_students_interval() -> None:
    trials = [trial_of(0, 100), trial_of(1, 50)]
    finals = [Final(trial=0, seed=seed, job="j", loss=loss) for seed, loss in ((1, 1.0), (2, 2.0), (3, 3.0))]
    finals.append(Final(trial=1, seed=1, job="j", loss=5.0))
    finals.append(Final(trial=1, seed=2, job="j"))
    small, large = members(trials, finals)
    assert (small.trial, small.loss, small.half_width, small.seeds) == (1, 5.0, 0.0, 1)
    assert (large.loss, large.seeds) == (2.0, 3)
    assert large.half_width == pytest.approx(4.302653 * 1.0 / sqrt(3))  # t(0.975, 2)


def test_the_knee_is_where_more_parameters_stop_to_pay() -> None:
    found = [member(0, 10, 3.0), member(1, 100, 1.2), member(2, 1000, 1.1), member(3, 10000, 1.0)]
    knee = chosen(found, "knee")
    assert knee is not None and knee.trial == 1
    assert chosen(found, "best") == found[3]


def test_a_member_that_another_one_beats_is_no_knee_and_few_have_none() -> None:
    found = [member(0, 10, 3.0), member(1, 100, 1.2), member(2, 100, 1.1), member(3, 1000, 1.0)]
    knee = chosen(found, "knee")
    assert knee is not None and knee.trial == 2
    assert chosen(found[:2], "knee") == found[1]
    assert chosen([], "knee") is None


class Service(Client):
    """Jobs that are over at the second look, with losses by graft and seed; a first run may be cut off."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.made: dict[str, tuple[str, dict[str, object]]] = {}
        self.keys: dict[str, str] = {}
        self.looked: dict[str, int] = {}
        self.promoted: list[str] = []
        self.left = fails_after

    def create_job(self, body: object, *, idempotency_key: str | None = None) -> RemoteJob:
        assert isinstance(body, dict) and idempotency_key is not None
        if idempotency_key not in self.keys:
            id = f"ftjob-{len(self.made)}"
            self.keys[idempotency_key], self.made[id] = id, (idempotency_key, body)
        return self._shown(self.keys[idempotency_key], over=False)

    def renew(self, job: str, lease_s: float) -> RemoteJob:
        return self._shown(job, over=False)

    def job(self, job: str) -> RemoteJob:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ApiFailure(0, "the service is gone")
        self.looked[job] = self.looked.get(job, 0) + 1
        return self._shown(job, over=self.looked[job] > 1)

    def promote_graft(self, graft: str) -> RemoteGraft:
        self.promoted.append(graft)
        return None  # type: ignore[return-value]

    def _shown(self, id: str, *, over: bool) -> RemoteJob:
        _, body = self.made[id]
        seed = int(str(body["seed"]))
        return RemoteJob(
            id=id,
            status="succeeded" if over else "running",
            model="tiny",
            created_at=0,
            fine_tuned_model=f"{body['suffix']}@{seed}" if over else None,
            loss_after=1.0 + seed / 10 if over else None,
            scores_after={"accuracy": 0.5} if over else {},
            test_loss=9.0 + seed if over else None,
            test_scores={"accuracy": seed / 4} if over else {},
        )


def searched(store: MemoryStore, **fields: object) -> tuple[Trial, ...]:
    plan = replace(plan_of(6), **fields)  # type: ignore[arg-type]
    study = open_study(store, STUDY, plan, tenant=EVE, clock=lambda: 0.0)
    for _ in range(6):
        trial = study.ask()
        study.tell(trial.number, invented(plan.space, trial))
    return study.front


def test_every_member_is_trained_on_every_seed_and_one_is_chosen_and_promoted() -> None:
    store, service = MemoryStore(), Service()
    front = searched(store, seeds=2, choose="best", promote=True, test_file="file-9")
    record = retrain(store, STUDY, front, service, clock=lambda: 0.0, pause=lambda _: None)
    assert {(final.trial, final.seed) for final in record.finals} == {(t.number, s) for t in front for s in (1, 2)}
    assert record.chosen is not None
    assert service.promoted == ["find@1"]
    bodies = [body for _, body in service.made.values()]
    assert {(body["validation_file"], body["test_file"]) for body in bodies} == {("file-2", "file-9")}
    assert {body["suffix"] for body in bodies} == {"find"}
    found = store.get(keys.study(STUDY))
    assert found is not None and decode(found.value.body) == record


def test_a_driver_that_died_among_finals_is_followed_by_one_that_trains_none_twice() -> None:
    store = MemoryStore()
    front = searched(store, seeds=2)
    service = Service(fails_after=5)
    with pytest.raises(ApiFailure):
        retrain(store, STUDY, front, service, clock=lambda: 0.0, pause=lambda _: None)
    service.left = None
    record = retrain(store, STUDY, front, service, clock=lambda: 0.0, pause=lambda _: None)
    pairs = [(final.trial, final.seed) for final in record.finals]
    assert sorted(pairs) == sorted((trial.number, seed) for trial in front for seed in (1, 2))
    assert len(service.made) == len(pairs) and service.promoted == []


def test_the_choice_is_by_validation_and_the_test_file_is_told_beside_it() -> None:
    """The member that is worse on validation is better in the test, by which nothing is chosen."""
    trials = [trial_of(0, 100), trial_of(1, 200)]

    def final(trial: int, seed: int, loss: float, tested: float) -> Final:
        told = Scores(exact_match=0.5, accuracy=1 - loss), Scores(accuracy=1 - tested)
        return Final(trial=trial, seed=seed, job="j", loss=loss, scores=told[0], test_loss=tested, test_scores=told[1])

    finals = [final(0, 1, 0.2, 0.9), final(0, 2, 0.4, 0.7), final(1, 1, 0.5, 0.1), final(1, 2, 0.6, 0.1)]
    one, other = members(trials, finals, "accuracy")
    assert one.score is not None and one.score.mean == pytest.approx(0.7)
    assert one.test_loss is not None and one.test_loss.mean == pytest.approx(0.8)
    assert other.test_score is not None and other.test_score == Interval(0.9, 0.0)
    for measured in ("loss", "accuracy"):
        assert chosen([one, other], "best", measured) == one


def test_a_score_that_is_searched_for_decides_where_the_loss_would_say_otherwise() -> None:
    scored = {0: 0.5, 1: 0.9}
    found = [replace(member(n, 10, 1.0 + n), score=Interval(score, 0.0)) for n, score in scored.items()]
    assert chosen(found, "best") == found[0] and chosen(found, "best", "accuracy") == found[1]


def test_what_the_finals_say_of_the_test_file_is_recorded() -> None:
    store, service = MemoryStore(), Service()
    record = retrain(store, STUDY, searched(store, seeds=1), service, clock=lambda: 0.0, pause=lambda _: None)
    assert {(one.loss, one.scores.accuracy, one.test_loss, one.test_scores.accuracy) for one in record.finals} == {
        (1.1, 0.5, 10.0, 0.25)
    }


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"test_file": "file-2"}, "test_file: file-2 is what the search"),
        ({"seeds": -1}, "seeds: -1"),
        ({"promote": True}, "promote: "),
    ],
)
def test_a_plan_for_finals_that_cannot_be_names_the_field(fields: dict[str, object], wrong: str) -> None:
    with pytest.raises(BadPlan, match=wrong):
        replace(plan_of(), **fields)  # type: ignore[arg-type]

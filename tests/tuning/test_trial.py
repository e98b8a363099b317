"""A trial against a played service, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.tune.experiment import Experiment
from ray.tune.registry import get_trainable_cls

from polygraft.tuning import trial as module
from polygraft.tuning.terms import Access, Terms
from polygraft.tuning.trial import JobTrial, trials_of
from tests.tuning.plans import plan_of
from tests.tuning.standin import KEY, StandIn, loss_of, stand_in

PLAN = plan_of(lease_s=5)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)


def begun(service: StandIn, number: int = 0, *, key: str = KEY) -> JobTrial:
    """As Tune makes it in an actor, but for Tune's own folders."""
    trial = JobTrial.__new__(JobTrial)
    terms = Terms("study-1", PLAN.lease_s)
    trial.setup(config_of(number), access=Access(service.url, key), terms=terms)
    return trial


def config_of(number: int) -> dict[str, object]:
    body = PLAN.request(study="study-1", number=number, peft=f"serial({number + 1})", learning_rate=1e-3)
    return {"number": number, "body": body}


def last(trial: JobTrial) -> dict[str, object]:
    while True:
        report = trial.step()
        if report["done"]:
            return report


@contextmanager
def served(seconds: float) -> Iterator[StandIn]:
    with stand_in(lambda _: seconds) as service:
        yield service


def test_a_trial_reports_how_far_its_job_is_and_what_came_of_it() -> None:
    with served(0.4) as service:
        trial = begun(service)
        shares = [trial.step()["progress"], last(trial)]
        job = service.of_trial(0)
        assert shares == [
            pytest.approx(0.1, abs=0.5),
            {
                "done": True,
                "loss": loss_of(2 * 2 * 6 * 64),
                "parameters": 2 * 2 * 6 * 64,
                "loss_before": 4.0,
                "model": "find-0@1",
                "progress": 1.0,
                "job": job.id,
            },
        ]


def test_the_job_of_a_trial_goes_on_when_its_actor_goes_to_another() -> None:
    with served(60) as service:
        trial = begun(service)
        trial.step()
        assert trial.reset_config(config_of(1))
        trial.step()
        trial.cleanup()
        assert [service.status(service.of_trial(number)) for number in (0, 1)] == ["running", "running"]


class Clock:
    """A trial's own, which goes on while it sleeps and at no other time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_lease_is_renewed_while_the_trial_is_stepped_and_runs_out_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with served(60) as service:
        trial = begun(service)
        for at, count in ((1.6, 1), (1.8, 2)):  # when it was submitted, and after a third of the lease
            while clock.now < at:
                trial.step()
            job = service.of_trial(0)
            assert len(job.renewed_at) == count
        assert job.lease_until == job.renewed_at[-1] + 5
        assert job.status(job.lease_until - 0.1) == "running" and job.status(job.lease_until + 0.1) == "cancelled"


def test_a_trial_looks_the_more_seldom_the_longer_it_runs_and_has_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "POLL_S", 1.0)

    def pause(at: float, step: int, *, lease_s: float = 600.0) -> float:
        clock.now = 0.0
        trial = begun(service)
        trial.step()
        assert trial._job is not None
        trial._terms = Terms("study-1", lease_s)
        clock.now = at
        return trial._pause_s(trial._job.model_copy(update={"step": step, "steps_total": 100}))

    with served(60) as service:
        assert [pause(at, 50) for at in (4, 40, 400)] == [1, 2, 20]
        assert [pause(400, step) for step in (0, 95, 99, 100)] == [
            20,
            pytest.approx(10.5, abs=0.1),
            pytest.approx(2.0, abs=0.1),
            1,
        ]
        assert pause(400, 50, lease_s=60) == 10


def test_a_job_that_an_earlier_driver_submitted_is_taken_over() -> None:
    with served(0.3) as service:
        begun(service).step()
        assert last(begun(service))["job"] == "ftjob-0"
        assert len(service.jobs) == 1


def test_a_job_that_was_cancelled_when_nobody_spoke_for_it_is_submitted_again() -> None:
    with served(0.3) as service:
        begun(service).step()
        service.cancel("ftjob-0")
        assert last(begun(service))["job"] == "ftjob-1"
        assert last(begun(service))["job"] == "ftjob-1"


def test_a_service_that_is_down_for_a_moment_does_not_end_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polygraft.cluster.client._RETRIES", 0)
    with served(0.6) as service:
        trial = begun(service)
        trial.step()
        service.down = True
        assert trial.step()["done"] is False
        service.down = False
        assert "loss" in last(trial)


def test_a_service_that_stays_away_for_a_lease_ends_the_trial_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(0.1) as service:
        trial = begun(service)
    monkeypatch.setattr(trial, "_heard_at", time.monotonic() - 6)
    assert "nothing answers at" in str(last(trial)["failure"])


def test_a_refused_or_cancelled_job_is_a_failure_with_the_reason() -> None:
    with served(60) as service:
        assert "HTTP 401" in str(last(begun(service, key="pg-wrong"))["failure"])
        trial = begun(service)
        trial.step()
        service.cancel("ftjob-0")
        assert last(trial)["failure"] == "the job was cancelled"


def test_the_trials_of_two_searches_at_once_ask_with_their_own_keys() -> None:
    terms = Terms("study-1", PLAN.lease_s)
    keys = ["pg-ann", "pg-bob", "pg-another-driver"]
    names = [Experiment.register_if_needed(trials_of("study-1", Access("http://nowhere", key), terms)) for key in keys]
    asked = []
    for name in names:
        kind = get_trainable_cls(name)
        trial = kind.__new__(kind)
        trial.setup(config_of(0))
        asked.append(trial._client._http.headers["Authorization"])
    assert asked == [f"Bearer {key}" for key in keys]

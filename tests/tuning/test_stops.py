"""Which trials are stopped, against a played service, without Ray."""

from __future__ import annotations

from dataclasses import replace

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import Client
from polygraft.tuning.ahead import LOOK_S
from polygraft.tuning.driver import stops_of
from polygraft.tuning.owned import submitted
from polygraft.tuning.stops import Jobs, Stops
from polygraft.tuning.study import Stopped, Study
from tests.tuning.plans import plan_of
from tests.tuning.standin import KEY, STEPS, stand_in

PLAN = replace(plan_of(lease_s=60), pruner="halving", minimise=("loss",))


def asking(jobs: Jobs, now: list[float]) -> tuple[Study, Stops]:
    study = Study(PLAN.space, PLAN.objectives, PLAN.sampler)
    stops = stops_of(PLAN, study, jobs, lambda: now[0])
    assert stops is not None
    return study, stops


def test_the_job_of_a_trial_that_is_stopped_is_cancelled_and_a_finished_one_stays() -> None:
    with stand_in(lambda number: 0.0 if number == 0 else 60.0) as service, Client(service.url, KEY) as client:
        study, stops = asking(client, [0.0])
        for number in range(2):
            trial = study.ask()
            body = PLAN.request(study="study-1", number=number, peft=trial.candidate.peft, learning_rate=1e-3)
            job = submitted(client, body, study="study-1", name=str(number), lease_s=60)
            outcome = Stopped(reason="behind", step=1, steps_total=STEPS, loss=2.0, curve=(2.0,), job=job.id)
            stops.told(study.tell(number, outcome))
        assert [service.status(service.of_trial(number)) for number in (0, 1)] == ["succeeded", "cancelled"]


def test_the_service_is_asked_every_other_second_and_more_seldom_where_many_run() -> None:
    class Counting:
        asked = 0

        def job(self, job: str) -> RemoteJob:
            self.asked += 1
            return RemoteJob(id=job, status="running", model="m", created_at=0)

        def events(self, job: str) -> list[object]:
            raise AssertionError("of a job that has not begun there are no losses")

        cancel = events

    for count, pause in ((4, LOOK_S), (80, 10.0)):
        now, jobs = [0.0], Counting()
        study, stops = asking(jobs, now)  # type: ignore[arg-type]
        running = {study.ask().number: f"ftjob-{number}" for number in range(count)}
        for at, looks in ((0.0, 1), (0.9 * pause, 1), (pause, 2)):
            now[0] = at
            assert stops.look(study.trials, running) == {} and jobs.asked == looks * count

"""A search through the real Tune: trials side by side, and one whose actor is killed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.store.memory import MemoryStore
from polygraft.tuning.driver import search
from polygraft.tuning.record import open_study
from polygraft.tuning.study import Failure, Result, Trial, TrialState
from polygraft.tuning.terms import Access
from tests.tuning.plans import plan_of
from tests.tuning.standin import KEY, StandIn, loss_of, stand_in

KILLED = 2
LEASE_S = 6.0


@contextmanager
def cluster() -> Iterator[None]:
    """Connected to a Ray that another process would have started; its folder is short, since socket paths are."""
    home = tempfile.mkdtemp(prefix="pg-")
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", home)
            head = Cluster(initialize_head=True, head_node_args=options)
            try:
                ray.init(address=head.address, log_to_driver=False, logging_level=logging.CRITICAL)
                yield
            finally:
                ray.shutdown()
                head.shutdown()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def pid_of(number: int) -> int | None:
    """The actor of a trial is the process below us that works in the trial's folder."""
    for process in psutil.Process().children(recursive=True):
        try:
            if f"trial-{number}" in process.cwd():
                return process.pid
        except psutil.Error:
            continue
    return None


def taken_over(service: StandIn, number: int) -> bool:
    """Whether the job of a trial, which the driver began, has been renewed by its actor, too."""
    jobs = [job for job in list(service.jobs.values()) if (job.request.metadata or {})["trial"] == str(number)]
    return any(len(job.renewed_at) > 1 for job in jobs)


def test_a_killed_trial_is_told_as_failed_and_its_job_is_left_to_its_lease(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = replace(plan_of(6), concurrency=3, lease_s=LEASE_S)
    store, study, seen, died_at = MemoryStore(), StudyId("study-1"), list[Trial](), list[float]()

    def kill(service: StandIn) -> None:
        while (pid := pid_of(KILLED)) is None or not taken_over(service, KILLED):
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        died_at.append(time.monotonic())

    with stand_in(lambda number: 60.0 if number == KILLED else 2.0) as service, cluster():
        service.lists = False  # so that the actor stays with the trial that it is killed at
        Thread(target=kill, args=(service,), daemon=True).start()
        result = search(
            plan,
            store=store,
            access=Access(service.url, KEY),
            tenant=TenantId("eve"),
            folder=tmp_path,
            study=study,
            on_trial=seen.append,
        )
        assert died_at, "the trial was never killed"
        time.sleep(max(0.0, died_at[0] + LEASE_S - time.monotonic()))
        jobs = {number: service.of_trial(number) for number in range(6)}
        states = {number: service.status(job) for number, job in jobs.items()}

    assert states == {number: "cancelled" if number == KILLED else "succeeded" for number in range(6)}
    assert all(at < died_at[0] for at in jobs[KILLED].renewed_at)
    assert len(service.jobs) == 6
    assert service.widest in (3, 4)  # the orphan may still run when another trial takes its trial's place
    outcomes = [trial.outcome for trial in result.trials]
    assert outcomes.pop(KILLED) == Failure(reason="the trial's process ended before its job")
    assert [outcome.values for outcome in outcomes if isinstance(outcome, Result)] == [
        (loss_of(trial.candidate.parameters), trial.candidate.parameters)
        for trial in result.trials
        if trial.number != KILLED
    ]
    told = [trial.told for trial in result.trials]
    assert told == sorted(told) and told[:3] == [0, 0, 0] and told[-1] >= 2
    assert [trial.state for trial in seen].count(TrialState.RUNNING) == 6 and len(seen) == 12
    assert open_study(store, study, plan, tenant=TenantId("eve"), clock=time.time).trials == result.trials
    printed = capfd.readouterr()
    assert printed.err == "" and "(raylet)" in printed.out and len(printed.out.splitlines()) == 1  # Ray, of the kill
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.nightly
def test_the_only_actor_leaves_a_trial_whose_job_is_slow_for_those_whose_are_over(tmp_path: Path) -> None:
    plan, seen = replace(plan_of(6), concurrency=3), list[Trial]()
    with stand_in(lambda number: 0.5 if number else 30.0) as service, cluster():
        search(
            plan,
            store=MemoryStore(),
            access=Access(service.url, KEY),
            tenant=TenantId("eve"),
            folder=tmp_path,
            on_trial=seen.append,
        )
        renewed = service.of_trial(0).renewed_at
    told = [trial.number for trial in seen if trial.state is TrialState.COMPLETE]
    assert sorted(told) == list(range(6)) and told[-1] == 0
    assert len(service.jobs) == 6 and len(renewed) >= 3, "by the driver, the actor and the driver again"


@pytest.mark.nightly
def test_tune_asks_again_until_a_round_of_the_population_is_over(tmp_path: Path) -> None:
    plan = replace(plan_of(9, model="lhs"), model="pbt", startup=3, concurrency=3)
    store, study = MemoryStore(), StudyId("study-1")
    with stand_in(lambda number: 0.5 + number % 3) as service, cluster():
        result = search(
            plan,
            store=store,
            access=Access(service.url, KEY),
            tenant=TenantId("eve"),
            folder=tmp_path,
            study=study,
        )
        rungs = [service.of_trial(number).request.rung for number in range(9)]
    assert [trial.state for trial in result.trials] == [TrialState.COMPLETE] * 9
    assert all(set(range(3)) <= set(trial.seen) for trial in result.trials[3:6])
    jobs = [trial.outcome.job for trial in result.trials if trial.outcome is not None]
    for trial, rung in zip(result.trials, rungs, strict=True):
        assert rung is not None and rung.until == (trial.number // 3 + 1) / 3
        assert rung.after == (None if trial.parent is None else jobs[trial.parent])

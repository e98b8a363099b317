"""A search that the service runs, whose driver is killed again and again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from polygraft.cluster.model import Search, Study, StudyId, TenantId
from polygraft.cluster.settings import load
from polygraft.cluster.states import SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.search_driver import keeper_of
from polygraft.tuning import keeper as keeping
from polygraft.tuning.record import StudyRecord, decode, encode
from polygraft.tuning.study import Study as Undisturbed
from polygraft.tuning.study import TrialState
from tests.ray.test_tune_driver import cluster
from tests.tuning.plans import plan_of
from tests.tuning.standin import stand_in

STUDY, EVE = StudyId("study-1"), TenantId("eve")
TRIALS, KILLS, PATIENCE_S = 12, 3, 240.0


def driver_pid() -> int | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if any("SearchDriver" in part for part in process.cmdline()[:1]):
                return process.pid
        except psutil.Error:
            continue
    return None


@pytest.mark.nightly
def test_no_trial_is_lost_or_run_twice_though_the_driver_is_killed_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "PAUSE_S", 0.2)
    plan = replace(plan_of(TRIALS, model="lhs"), pruner="halving", minimise=("loss",), seeds=1)
    with stand_in(lambda number: 1.5) as service, EmbeddedServer(tmp_path / "valkey") as server, cluster():
        service.any_key = True
        settings = load(home=tmp_path / "home", store_url=server.url)
        store = connect(server.url)
        record = encode(StudyRecord(plan=plan))
        search = Search(id=STUDY, tenant=EVE, name="find", created_at=1.0)
        study = Study(id=STUDY, tenant=EVE, name="find", created_at=1.0, updated_at=1.0, body=record)
        store.commit([Write(keys.search(STUDY), search, 0), Write(keys.study(STUDY), study, 0)])
        found, told = store.get(keys.search(STUDY)), store.get(keys.study(STUDY))
        keeper, killed, until = keeper_of(settings, service.url), 0, time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            keeper.tick()
            found, told = store.get(keys.search(STUDY)), store.get(keys.study(STUDY))
            assert found is not None and told is not None
            if found.value.state is not SearchState.RUNNING:
                break
            done = sum(trial.outcome is not None for trial in decode(told.value.body).trials)
            if killed < KILLS and done > 3 * killed and (pid := driver_pid()):
                os.kill(pid, signal.SIGKILL)
                killed += 1
            time.sleep(0.2)
        store.close()
    assert found is not None and told is not None
    assert (found.value.state, found.value.starts) == (SearchState.SUCCEEDED, KILLS + 1), found.value.note
    after = decode(told.value.body)
    assert [trial.number for trial in after.trials] == list(range(TRIALS))
    states = [trial.state for trial in after.trials]
    assert states.count(TrialState.COMPLETE) + states.count(TrialState.STOPPED) == TRIALS
    assert TrialState.STOPPED in states
    assert len(after.finals) == 1 and after.chosen == after.finals[0].trial
    assert len(service.jobs) == TRIALS + 1
    undisturbed = Undisturbed(plan.space, plan.objectives, plan.sampler)
    assert [trial.config for trial in after.trials] == [undisturbed.ask().config for _ in range(TRIALS)]

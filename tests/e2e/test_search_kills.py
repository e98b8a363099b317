"""200 trials through `/v1/searches` on the embedded default, while their driver is killed three times and the service
is taken down and up once: no trial is lost or told twice, and what was found is what an undisturbed search finds."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from polygraft.cluster import searches as remote
from polygraft.cluster.answers import Answer
from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.searches import RemoteSearch
from polygraft.cluster.service import ServiceNotRunning, find_service, read_key
from polygraft.grafts.sites import ModelShape
from polygraft.launch.processes import session
from polygraft.tuning.desk import read
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.study import Trial, TrialState, as_seen, pareto
from tests.e2e.test_by_hand import SETTINGS, TRAINING, Shell
from tests.tiny import tiny_llama

KILLS, PATIENCE_S = 3, 1500.0
SPACE: dict[str, JsonValue] = {"kind": "autopeft", "groups": 2, "largest": 16, "longest": 8}


class Event(Answer):
    id: str
    message: str
    trial: int | None


pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def polygraft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("killed")
    shell = Shell(folder / "home", SETTINGS)
    up(shell, tiny_llama(folder / "tiny"))
    yield shell
    shell("down")


def up(polygraft: Shell, backbone: Path) -> None:
    polygraft("up", "--backbone", str(backbone), "--dtype", "fp32")


def client(polygraft: Shell) -> Client:
    service = find_service(polygraft.home / "run" / "service.json")
    return Client(service.url, read_key(polygraft.home / "api_key"))


def begun(polygraft: Shell, name: str, sampler: str, trials: int) -> tuple[dict[str, JsonValue], str]:
    with client(polygraft) as api:
        files = [api.upload(TRAINING.encode(), filename=f"{part}.jsonl").id for part in ("train", "held-out")]
        body: dict[str, JsonValue] = {
            "name": name,
            "training_file": files[0],
            "validation_file": files[1],
            "trials": trials,
            "concurrency": 8,
            "sampler": sampler,
            "space": SPACE,
            "hyperparameters": {"n_epochs": 1, "batch_size": 16, "max_length": 48},
        }
        return body, remote.create(api, body).id


def driver(polygraft: Shell) -> int | None:
    for leader in polygraft.sessions:
        for pid in session(leader):
            try:
                if any("SearchDriver" in part for part in psutil.Process(pid).cmdline()[:1]):
                    return pid
            except psutil.Error:
                continue
    return None


def over(polygraft: Shell, search: str, backbone: Path | None) -> RemoteSearch:
    """The search once it is; with a backbone it is disturbed on the way: at every fifth of its trials the driver is
    killed, and at the fourth the service goes down and comes up."""
    disturbed, until = 0, time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            with client(polygraft) as api:
                found = remote.show(api, search)
        except (ApiFailure, ServiceNotRunning):  # it is busy
            time.sleep(1.0)
            continue
        if found.final:
            assert backbone is None or disturbed == KILLS + 1, f"it was over after {disturbed} disturbances"
            return found
        done = sum(found.trials.values()) - found.trials.get("running", 0)
        if backbone is not None and 5 * done > (disturbed + 1) * found.trials_total:
            if disturbed < KILLS and (pid := driver(polygraft)):
                os.kill(pid, signal.SIGKILL)
                disturbed += 1
            elif disturbed == KILLS:
                polygraft("down")
                up(polygraft, backbone)
                disturbed += 1
        time.sleep(0.5)
    raise AssertionError(f"{search} is not over after {PATIENCE_S:.0f} s")


def trials_of(polygraft: Shell, search: str) -> list[Trial]:
    with client(polygraft) as api:
        return [read(one.model_dump(exclude={"id", "object"})) for one in remote.trials(api, search)]


@pytest.mark.parametrize(
    ("sampler", "trials"), [("lhs", 200), ("random", 200), ("nsga2", 200), ("tpe", 200), ("gp", 30)]
)
def test_nothing_is_lost_or_told_twice_and_what_is_found_is_what_an_undisturbed_search_finds(
    sampler: str, trials: int, polygraft: Shell
) -> None:
    backbone = polygraft.home.parent / "tiny"
    body, search = begun(polygraft, f"{sampler}-disturbed", sampler, trials)
    ended = over(polygraft, search, backbone)
    assert ended.status == "succeeded", ended.note
    found = trials_of(polygraft, search)
    assert [trial.number for trial in found] == list(range(trials))
    assert {trial.state for trial in found} == {TrialState.COMPLETE}
    with client(polygraft) as api:
        jobs = [job for job in api.jobs() if job.id in {trial.outcome.job for trial in found if trial.outcome}]
        told = Counter(
            one.trial for one in api.pages(Event, f"/searches/{search}/events") if " complete:" in one.message
        )
    assert len(jobs) == trials and {job.status for job in jobs} == {"succeeded"}
    assert {str(job.fine_tuned_model).rpartition("@")[2] for job in jobs} == {"1"}, "a trial was trained twice"
    assert max(told.values()) == 1, "a trial was told twice"
    plan = SearchRequest.model_validate(body).plan(backbone="smollm2", shape=ModelShape(**ended.shape))  # type: ignore[arg-type]
    for trial in found:  # the record of what it had seen gives every suggestion again
        assert dict(plan.sampler.propose(as_seen(found, trial.number), trial.attempt)) == trial.config, trial.number
    if sampler in ("lhs", "random", "nsga2"):
        _, undisturbed = begun(polygraft, f"{sampler}-undisturbed", sampler, trials)
        over(polygraft, undisturbed, None)
        other = trials_of(polygraft, undisturbed)
        assert [trial.config for trial in other] == [trial.config for trial in found]
        assert [trial.values for trial in other] == [trial.values for trial in found]
        assert (
            [trial.number for trial in pareto(other)] == [trial.number for trial in pareto(found)] == list(ended.front)
        )

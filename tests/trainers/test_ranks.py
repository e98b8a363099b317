"""A pack over two devices, a process each, publishes what one over one device publishes, bit for bit, also when one of
the two is killed; and a job that raises on one of them alone fails on both, alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polygraft.cluster.model import Job, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit
from tests.trainers.two_ranks import RAISES

JOBS = {
    "ftjob-0": "lora(r=4, at=attn.*)",
    "ftjob-1": "prefix(4) + mezo(0.05)",
    RAISES: "lora(r=2, dropout=0.2) + serial(4)",
}
KINDS = ("alone", "calm", "kill", "raise")


@dataclass(frozen=True)
class Ran:
    began_again: int
    jobs: Mapping[str, Job]
    losses: Mapping[str, list[JSON]]
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    with ExitStack() as stack:
        packs: dict[str, tuple[Store, Path]] = {}
        given = [str(folder)]
        for kind in KINDS:
            data = tmp_path_factory.mktemp(kind)
            server = stack.enter_context(EmbeddedServer(data / "store"))
            store = stack.enter_context(closing(connect(server.url)))
            _submit(store, data)
            packs[kind] = store, data
            given += [server.url, str(data), kind]
        command = [sys.executable, "-m", "tests.trainers.two_ranks", *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        began = map(int, done.stdout.split())
        return {kind: _ran(*packs[kind], again) for kind, again in zip(packs, began, strict=True)}


@pytest.fixture(scope="module")
def alone(ran: Mapping[str, Ran]) -> Ran:
    """In a process like theirs: what other tests have done to torch in this one is not part of the promise."""
    return ran["alone"]


def test_two_ranks_publish_the_bits_of_one_in_fewer_steps(ran: Mapping[str, Ran], alone: Ran) -> None:
    two = ran["calm"]
    assert two.began_again == 0
    assert {job: one.graft for job, one in two.jobs.items()} == {job: one.graft for job, one in alone.jobs.items()}
    assert two.losses == alone.losses and all(job.state is JobState.SUCCEEDED for job in two.jobs.values())
    rode, rows = (
        [sum(what(step) for step in run.steps) for run in (two, alone)]
        for what in (lambda step: RAISES in step["jobs"], lambda step: step["rows"])
    )
    assert rows[0] == rows[1] and 2 * rode[0] <= rode[1] + 4, "two micro-batches of a step at a time"


def test_a_pack_whose_second_rank_is_killed_goes_on_from_its_checkpoints_to_the_same_bits(
    ran: Mapping[str, Ran], alone: Ran
) -> None:
    killed = ran["kill"]
    assert killed.began_again == 1
    assert {job: one.graft for job, one in killed.jobs.items()} == {job: one.graft for job, one in alone.jobs.items()}


def test_a_job_that_raises_on_one_rank_fails_on_both_and_no_other_does(ran: Mapping[str, Ran], alone: Ran) -> None:
    raising = ran["raise"]
    assert raising.began_again == 0
    error = raising.jobs[RAISES].error
    assert raising.jobs[RAISES].state is JobState.FAILED and error is not None and "only here" in error.message
    others = [job for job in JOBS if job != RAISES]
    assert [raising.jobs[job].graft for job in others] == [alone.jobs[job].graft for job in others]


def _submit(store: Store, data: Path) -> None:
    submit(store, data, JOBS)
    store.append(keys.commands(PACK), {"op": "close", "job": ""})


def _ran(store: Store, data: Path, began_again: int) -> Ran:
    records = {job: store.get(keys.job(JobId(job))) for job in JOBS}
    losses = {job: [entry["loss"] for _, entry in store.read(keys.metrics(JobId(job)))] for job in JOBS}
    steps = [json.loads(line) for line in (data / "packs" / PACK / "steps.jsonl").read_text().splitlines()]
    return Ran(began_again, {job: found.value for job, found in records.items() if found is not None}, losses, steps)

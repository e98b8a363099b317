"""Processes of a pack that one of its jobs kills, or takes the memory of: the job is found out, and no other one's bits
change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from polygraft.cluster.model import Job, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.runtime.process import device_environment
from polygraft.trainers.blame import Blame
from polygraft.trainers.host import suspected
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.underway import Underway
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit, submit_text

GOOD = {"ftjob-0": "lora(r=4, at=attn.*)", "ftjob-2": "ia3", "ftjob-3": "prefix(4) + mezo(0.05)"}
BAD = JobId("ftjob-1")
TOKENS = 1024
ROOM = 64 << 20  # between what the others take and what a step over the bad job's example does
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 10))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with room for long examples."""
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@dataclass(frozen=True)
class Ran:
    died: int
    jobs: Mapping[JobId, Job]


@pytest.fixture(scope="module", params=SEEDS)
def ran(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """Three packs of the good jobs and the bad one: with memory enough, killed beyond a bound, refused more than it."""
    rooms = {"calm": (1 << 40, "kill"), "kill": (ROOM, "kill"), "refuse": (ROOM, "refuse")}
    with ExitStack() as stack:
        packs: dict[str, Store] = {}
        given = [str(folder)]
        for name, (room, kind) in rooms.items():
            data = tmp_path_factory.mktemp(name)
            server = stack.enter_context(EmbeddedServer(data / "store"))
            packs[name] = store = stack.enter_context(closing(connect(server.url)))
            submit(store, data, GOOD, seed=request.param)
            submit_text(store, data, BAD, "lora(r=4)", ["graft " * TOKENS], max_length=TOKENS)
            store.append(keys.commands(PACK), {"op": "close", "job": ""})
            given += [server.url, str(data), str(room), kind]
        command = [sys.executable, "-m", "tests.trainers.killed_pack", *given]
        environment = {**os.environ, **device_environment(1)}  # as a pack's worker has it
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 0, done.stderr
        deaths = map(int, done.stdout.split())
        return {name: Ran(died, _jobs(packs[name])) for name, died in zip(packs, deaths, strict=True)}


@pytest.mark.parametrize("kind", ["kill", "refuse"])
def test_a_job_that_takes_all_memory_fails_and_the_others_keep_their_bits(kind: str, ran: Mapping[str, Ran]) -> None:
    """What is refused memory is told so where torch asked for it, and ends its process where native code did: a product
    that oneDNN could not compile, or a null pointer. The second of two deaths that it is alone in proves it guilty."""
    calm, stormy = ran["calm"], ran[kind]
    assert calm.died == 0
    assert all(job.state is JobState.SUCCEEDED for job in calm.jobs.values()), "with memory enough no job fails"
    error = stormy.jobs[BAD].error
    assert stormy.jobs[BAD].state is JobState.FAILED and error is not None
    if kind == "refuse" and error.code == "out_of_memory":
        assert f"{TOKENS - 1} rows" in error.message and stormy.died <= 3
    else:
        assert (error.code, stormy.died) == ("killed_its_worker", 3) and "max_length" in error.message
    assert "step 1" in error.message
    for job in map(JobId, GOOD):
        assert stormy.jobs[job].graft == calm.jobs[job].graft, stormy.jobs[job].error


def _jobs(store: Store) -> Mapping[JobId, Job]:
    records = {job: store.get(keys.job(job)) for job in (*map(JobId, GOOD), BAD)}
    return {job: record.value for job, record in records.items() if record is not None}


def test_a_first_death_keeps_nobody_apart_and_halves_a_forward() -> None:
    blame, guilty = Blame().after_death({"a": 3, "b": 5})
    assert (guilty, blame.suspects(), blame.rows(768)) == (None, (), 384)


def test_a_second_death_in_the_same_step_keeps_its_jobs_apart_the_least_suspected_first() -> None:
    blame = Blame().after_death({"b": 5, "c": 0})[0].after_death({"a": 3, "b": 5, "c": 0})[0]
    assert blame.suspects() == ("b", "c")
    assert blame.after_death({"a": 3, "b": 5})[0].suspects() == ("a", "c", "b")


def test_who_gets_past_the_step_of_its_last_death_is_no_suspect() -> None:
    blame = Blame().after_death({"a": 3, "b": 5})[0].after_death({"a": 3, "b": 5})[0]
    assert blame.at({"a": 3, "b": 5}) == blame
    assert blame.at({"a": 4, "b": 5}).suspects() == ("b",)
    assert blame.without("b").suspects() == ("a",)


def test_who_is_alone_in_a_second_death_is_guilty_and_the_others_are_free() -> None:
    blame = Blame().after_death({"a": 3, "b": 5})[0].after_death({"a": 3, "b": 5})[0]
    assert blame.after_death({"b": 5}) == (Blame(), "b")
    once, guilty = Blame().after_death({"b": 5})
    assert guilty is None and once.after_death({"b": 5})[1] == "b"


def test_what_was_underway_is_known_to_the_next_worker_and_only_until_it_is_over(tmp_path: Path) -> None:
    first = Underway(tmp_path)
    assert first.left() == {}
    first.note({"ftjob-with-a-long-name": 12, "ftjob-b": -1})
    first.note({"ftjob-b": 7})
    assert Underway(tmp_path).left() == {"ftjob-b": 7}
    first.clear()
    assert Underway(tmp_path).left() == {}


def test_a_pack_that_died_too_often_suspects_those_of_several_deaths_and_of_its_last(tmp_path: Path) -> None:
    assert suspected(tmp_path / "new") == frozenset()
    blame = Blame().after_death({"a": 3, "b": 5})[0]
    Manifest(blame=blame).save(tmp_path)
    assert suspected(tmp_path) == frozenset()
    underway = Underway(tmp_path)
    underway.note({"b": 5, "c": 1})
    assert suspected(tmp_path) == {"b"}
    Manifest(blame=blame.after_death({"a": 3, "b": 5})[0]).save(tmp_path)
    assert suspected(tmp_path) == {"a", "b"}
    underway.note({"b": 5})
    assert suspected(tmp_path) == {"b"}, "it was alone"


def test_a_torn_note_blames_nobody(tmp_path: Path) -> None:
    (tmp_path / "underway.json").write_bytes(b"\0" * 5000)
    assert Underway(tmp_path).left() == {}

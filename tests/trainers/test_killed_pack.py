"""Processes of a pack that one of its jobs kills, or takes the memory of: the job is found out, and no other one's bits
change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polygraft.cluster.model import Job, JobError, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.trainers.blame import Blame
from polygraft.trainers.underway import Underway
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit, submit_text

GOOD = {"ftjob-0": "lora(r=4, at=attn.*)", "ftjob-2": "ia3", "ftjob-3": "prefix(4) + mezo(0.05)"}
BAD = JobId("ftjob-1")
TOKENS = 1536
ROOM = 120 << 20  # between what the others take and what a step over the bad job's example does
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 10))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with room for long examples."""
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["kill", "refuse"])
def test_a_job_that_takes_all_memory_fails_and_the_others_keep_their_bits(
    kind: str, seed: int, folder: Path, tmp_path: Path
) -> None:
    calm = {job.id: job.graft for job in ran(folder, tmp_path / "calm", 1 << 40, "kill", seed)[1]}
    assert all(calm.values()), "with memory enough no job fails"
    died, jobs = ran(folder, tmp_path / "stormy", ROOM, kind, seed)
    assert died == (3 if kind == "kill" else 0)
    for job in jobs:
        if job.id == BAD:
            assert job.state is JobState.FAILED and job.error is not None
            assert_told(job.error, kind)
        else:
            assert (job.state, job.graft) == (JobState.SUCCEEDED, calm[job.id]), job.error


def assert_told(error: JobError, kind: str) -> None:
    code, says = ("killed_its_worker", "max_length") if kind == "kill" else ("out_of_memory", f"{TOKENS - 1} rows")
    assert error.code == code and "step 1" in error.message and says in error.message


def ran(folder: Path, data: Path, room: int, kind: str, seed: int) -> tuple[int, list[Job]]:
    """How many workers died of a pack of the good jobs and the bad one, and what became of its jobs."""
    with EmbeddedServer(data / "store") as server:
        store = connect(server.url)
        submit(store, data, GOOD, seed=seed)
        submit_text(store, data, BAD, "lora(r=4)", ["graft " * TOKENS], max_length=TOKENS, epochs=1)
        store.append(keys.commands(PACK), {"op": "close", "job": ""})
        script = Path(__file__).with_name("killed_pack.py")
        command = [sys.executable, "-m", "tests.trainers.killed_pack", folder, server.url, data, str(room), kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=script.parents[2])
        assert done.returncode == 0, done.stderr
        jobs = _jobs(store)
        store.close()
    return int(done.stdout), jobs


def _jobs(store: Store) -> list[Job]:
    records = [store.get(keys.job(job)) for job in (*map(JobId, GOOD), BAD)]
    return [record.value for record in records if record is not None]


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


def test_a_torn_note_blames_nobody(tmp_path: Path) -> None:
    (tmp_path / "underway.json").write_bytes(b"\0" * 40)
    assert Underway(tmp_path).left() == {}

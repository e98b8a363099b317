"""What the demo reads out of the step logs, and what it takes for broken."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from polygraft.cluster.searches import RemoteSearch
from polygraft.cluster.spec import read_request
from polygraft.launch.demo.memory import PeakMemory, occupied
from polygraft.launch.demo.plan import JOBS, DemoJob
from polygraft.launch.demo.search import ASKED, TRIALS, Searched
from polygraft.launch.demo.serve import rounds
from polygraft.launch.demo.steps import Mixing, Packing, mixing, packing
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.study import Result, Stopped, Study
from tests.tiny import TINY


def log(path: Path, *lines: dict[str, object]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ro')  # and one being written


def test_packing_counts_only_the_steps_of_the_given_jobs(tmp_path: Path) -> None:
    log(
        tmp_path / "packs" / "pack-1" / "steps.jsonl",
        {"jobs": ["a"], "rows": 100},
        {"jobs": ["a", "b", "c"], "rows": 300},
        {"jobs": ["b", "c", "other"], "rows": 500},
        {"jobs": ["other"], "rows": 999},
    )
    expected = Packing(packs=1, steps=3, median_jobs=3, most_jobs=3, median_rows=300)
    assert packing(tmp_path, frozenset("abc")) == expected


def test_mixing_counts_decoding_steps_and_no_bare_backbone(tmp_path: Path) -> None:
    four = {"grafts": ["g1", "g2", "g3", "g4", None], "methods": ["dora", "ia3", "lora"]}
    log(
        tmp_path / "replicas" / "replica-0" / "steps.jsonl",
        {"time": 5.0, "prefill_rows": 0, **four},
        {"time": 11.0, "prefill_rows": 40, **four},
        {"time": 12.0, "prefill_rows": 0, **four},
        {"time": 13.0, "prefill_rows": 0, "grafts": [None, "g1"], "methods": ["lora"]},
    )
    expected = Mixing(replicas=1, steps=2, most_grafts=4, methods_then=3, mixed_steps=1)
    assert mixing(tmp_path, 10.0, grafts=4, methods=3) == expected


def test_no_logs_prove_nothing(tmp_path: Path) -> None:
    assert packing(tmp_path, frozenset("a")).median_jobs == 0
    assert mixing(tmp_path, 0.0, grafts=4, methods=3).mixed_steps == 0


def test_a_burst_goes_round_the_models_each_with_its_own_questions() -> None:
    models = [("m1", "k1", ["a", "b"]), ("m2", "k2", ["c"])]
    asked = [(ask.model, ask.key, ask.question) for ask in rounds(models, 5)]
    assert asked == [("m1", "k1", "a"), ("m2", "k2", "c"), ("m1", "k1", "b"), ("m2", "k2", "c"), ("m1", "k1", "a")]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.label)
def test_every_job_of_the_plan_is_a_valid_request(job: DemoJob) -> None:
    body = job.body(model="smollm2", training_file="file-1", validation_file="file-2", suffix="share")
    assert read_request(body).suffix == "share"


def test_the_plan_differs_in_method_rate_batch_length_and_epochs() -> None:
    assert len({job.peft for job in JOBS}) == len(JOBS) == 8
    for field in ("learning_rate", "batch_size", "max_length", "n_epochs"):
        assert len({getattr(job, field) for job in JOBS}) > 1, field


def test_its_search_can_be_carried_out_and_says_what_it_did_not_keep(tmp_path: Path) -> None:
    asked = {"name": "food", "training_file": "file-1", "validation_file": "file-2", **ASKED}
    plan = SearchRequest.model_validate(asked).plan(backbone="smollm2", shape=replace(TINY, layers=6))
    study = Study(plan.space, plan.objectives, plan.sampler)
    for number in range(TRIALS):
        trial = study.ask()
        stopped = Stopped(reason="behind", step=2, steps_total=8, loss=2.0, curve=(2.0,))
        result = Result(values=(1.0 + number, 100.0 + number), loss=1.0 + number)
        study.tell(trial.number, stopped if number % 2 else result)
    over = RemoteSearch(id="s", name="food", created_at=1, status="succeeded", front=(0,), chosen=0)
    found = Searched(over, study.trials, 1.0, tmp_path / "front.png")
    assert not list(found.broken()) and found.informed == TRIALS - 1
    assert found.saved == pytest.approx(0.375)
    assert [point.trial for point in found.front] == [0]
    short = Searched(over.model_copy(update={"status": "failed", "note": "why", "chosen": None}), (), 1.0, tmp_path)
    said = list(short.broken())
    assert len(said) == 4 and said[0] == f"the search failed, 0 of {TRIALS} trials finished or were stopped: why"


def test_peak_memory_counts_this_process() -> None:
    with PeakMemory(os.getpid()) as memory:
        pass
    assert memory.bytes > 1 << 20
    assert occupied(os.getpid()) > 1 << 20

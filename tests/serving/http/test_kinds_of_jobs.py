"""Jobs on choice sets and labelled texts: what may be asked, and what each file is refused for."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from polygraft.cluster.advance import record_progress
from polygraft.cluster.model import JobId
from polygraft.cluster.scores import Judged, Scores
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from tests.serving.http.conftest import CHOICES, LABELLED, Service, jsonl, refusal, upload
from tests.serving.http.test_jobs import body, supervised

pytestmark = pytest.mark.anyio


async def test_a_choice_set_is_a_training_validation_and_test_file(service: Service, ann: httpx.AsyncClient) -> None:
    file, test = await upload(ann, jsonl(CHOICES)), await upload(ann, jsonl(CHOICES, CHOICES))
    asked = body(file, validation_file=file, test_file=test)
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["test_file"] == test and made["test_loss"] is None and made["scores_after"] == {}
    counted = (await ann.post("/fine_tuning/dry_runs", json=asked)).json()
    assert counted["test_file"]["examples"] == 2 and counted["validation_file"]["id"] == file
    assert refusal(await ann.delete(f"/files/{test}"), 409)["code"] == "file_in_use"
    lost = refusal(await ann.post("/fine_tuning/jobs", json={**asked, "test_file": "file-none"}), 404)
    assert lost["param"] == "test_file"
    said = Judged(after=Scores(accuracy=0.5), test_loss=1.5, test=Scores(accuracy=0.25))
    record_progress(service.api.store, JobId(made["id"]), step=1, trained_tokens=1, judged=said)
    shown = (await ann.get(f"/fine_tuning/jobs/{made['id']}")).json()
    assert shown["scores_after"] == {"accuracy": 0.5} and shown["scores_before"] == {}
    assert (shown["test_loss"], shown["test_scores"]) == (1.5, {"accuracy": 0.25})


def classification(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "classification", "classification": {"hyperparameters": hyperparameters}}


async def test_a_job_may_classify_labelled_texts(service: Service, ann: httpx.AsyncClient) -> None:
    file = await upload(ann, jsonl(*LABELLED))
    asked = body(file, validation_file=file, method=classification(peft="lora(r=4, at=attn.*)", n_epochs=2))
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["method"]["type"] == "classification"
    assert made["method"]["classification"]["hyperparameters"]["peft"] == "lora(r=4, at=attn.*)"
    lora = BoundGraft(parse("lora(r=4, at=attn.*)"), service.backbone.shape).parameters
    assert made["parameters"] == lora + 2 * service.backbone.shape.hidden
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "target_modules": ["q_proj"]}
    saved = classification(peft={**config, "modules_to_save": ["classifier", "score"]})
    assert (await ann.post("/fine_tuning/jobs", json=body(file, method=saved))).status_code == 200
    counted = (await ann.post("/fine_tuning/dry_runs", json=asked)).json()
    assert (counted["training_file"]["examples"], counted["training_file"]["trained_tokens"]) == (2, 2)


async def test_a_classification_that_cannot_be_is_refused_with_field_and_line(ann: httpx.AsyncClient) -> None:
    file, chat = await upload(ann, jsonl(*LABELLED)), await upload(ann)
    other = await upload(ann, jsonl(*LABELLED, {"sentence": "a bitter one", "label": "bitter"}))
    one = await upload(ann, jsonl(LABELLED[0]))
    both = {"type": "classification", "supervised": {"hyperparameters": {}}}
    for changes, param, said in (
        ({"training_file": chat, "method": classification()}, "training_file", "line 1: label: required, but missing"),
        ({"training_file": one, "method": classification()}, "training_file", 'label: "sweet" is the only one'),
        ({"method": supervised()}, "training_file", "line 1: label: a labelled text is for a job whose method is"),
        ({"validation_file": other, "method": classification()}, "validation_file", "line 3: label: 'bitter' is not"),
        ({"method": classification(peft="lorra")}, "method.classification.hyperparameters.peft", "choices: adalora"),
        ({"method": both}, "method", "supervised: given with type 'classification'"),
    ):
        error = refusal(await ann.post("/fine_tuning/jobs", json={**body(file), **changes}), 400)
        assert error["param"] == param and said in error["message"], error


async def test_a_choice_that_would_be_cut_is_refused_where_it_is_judged_alone(ann: httpx.AsyncClient) -> None:
    long = {"prompt": "Which?", "choices": ["graft " * 60, "yes"], "answer": 1}
    file, method = await upload(ann, jsonl(long)), supervised(max_length=45)
    assert (await ann.post("/fine_tuning/jobs", json=body(file, method=method))).status_code == 200
    asked = body(file, validation_file=file, method=method)
    error = refusal(await ann.post("/fine_tuning/jobs", json=asked), 400)
    assert error["param"] == "validation_file" and error["message"].startswith("validation_file: line 1: choices: ")

"""What a job's hyperparameters mean, and that those which a job is answered with mean the same."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from polygraft.cluster.model import JobId
from polygraft.cluster.store import keys
from tests.serving.http.conftest import Service, upload
from tests.serving.http.test_jobs import body, supervised

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("peft", "rate"),
    [("lora", 3e-4), ("ia3", 5e-3), ("prefix(10) + parallel(64)@0 + lora(r=4)", 3e-4), ("p-tuning-v2(3)", 5e-3)],
)
async def test_the_learning_rate_defaults_to_the_methods_smallest(
    ann: httpx.AsyncClient, peft: str, rate: float
) -> None:
    file = await upload(ann)
    made = (await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(peft=peft)))).json()
    assert made["method"]["supervised"]["hyperparameters"]["learning_rate"] == rate


async def test_openais_multiplier_scales_the_default_rate(ann: httpx.AsyncClient) -> None:
    asked = body(await upload(ann), hyperparameters={"learning_rate_multiplier": 2.0, "n_epochs": 1})
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["method"]["supervised"]["hyperparameters"]["learning_rate"] == 6e-4


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"peft": "lora(r=4, at=attn.*)", "learning_rate": 0.01, "dropout": 0.1, "max_length": 64, "schedule": "cosine"},
        {"peft": "ia3", "learning_rate_multiplier": 2.0, "n_epochs": 2, "warmup_ratio": 0.1, "weight_decay": 0.1},
        {"peft": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}},
    ],
)
async def test_the_method_of_an_answer_can_be_sent_again_and_means_the_same(
    service: Service, ann: httpx.AsyncClient, hyperparameters: dict[str, Any]
) -> None:
    file = await upload(ann)
    made = (await ann.post("/fine_tuning/jobs", json=body(file, method=supervised(**hyperparameters)))).json()
    answered = (await ann.get(f"/fine_tuning/jobs/{made['id']}")).json()["method"]
    again = await ann.post("/fine_tuning/jobs", json=body(file, method=answered))
    assert again.status_code == 200, again.text
    assert again.json()["method"] == answered
    first, second = (service.api.store.get(keys.job(JobId(one["id"]))) for one in (made, again.json()))
    assert first is not None and second is not None and first.value.spec == second.value.spec


async def test_a_rate_that_its_multiplier_contradicts_is_refused(ann: httpx.AsyncClient) -> None:
    hyperparameters = {"learning_rate": 6e-4, "learning_rate_multiplier": 2.0}
    refused = await ann.post("/fine_tuning/jobs", json=body(await upload(ann), method=supervised(**hyperparameters)))
    assert refused.status_code == 400
    said = refused.json()["error"]["message"]
    assert "learning_rate (0.0006) and learning_rate_multiplier (2) are both given; give one" in said

"""`/v1/fine_tuning/dry_runs`: what a job would be and what it would cut; `max_length` by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from polygraft.cluster.model import Limits
from polygraft.cluster.store import keys
from polygraft.serving.http.app import create_app
from tests.serving.http.conftest import EXAMPLE, PACK_BYTES, Service, jsonl, refusal, upload

pytestmark = pytest.mark.anyio
LONG = {"messages": [{"role": "user", "content": "write"}, {"role": "assistant", "content": "graft " * 300 + "end"}]}


def body(file: str, **hyperparameters: Any) -> dict[str, Any]:
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return {"model": "tiny", "training_file": file, "method": method}


async def test_a_dry_run_counts_what_a_job_would_cut_and_makes_nothing(
    service: Service, ann: httpx.AsyncClient
) -> None:
    file = await upload(ann, jsonl(EXAMPLE, LONG))
    whole = (await ann.post("/fine_tuning/dry_runs", json=body(file, n_epochs=3, batch_size=1))).json()
    counted = whole["training_file"]
    assert (whole["max_length"], whole["steps"], whole["validation_file"]) == (512, 6, None)
    assert (counted["id"], counted["examples"], counted["complete"]) == (file, 2, True)
    assert counted["longest"] > 300 and counted["cut"] == 0 and counted["warning"] is None

    asked = {**body(file, max_length=100), "validation_file": file}
    cut = (await ann.post("/fine_tuning/dry_runs", json=asked)).json()
    assert cut["max_length"] == 100 and cut["training_file"] == cut["validation_file"]
    left = counted["longest"] - 100
    assert (cut["training_file"]["cut"], cut["training_file"]["cut_tokens"]) == (1, left)
    assert cut["training_file"]["tokens"] == counted["tokens"]
    assert cut["training_file"]["warning"].startswith("1 of 2 examples are longer than 100 tokens")
    assert not list(service.api.store.scan(keys.JOBS))


async def test_a_dry_run_refuses_what_a_job_is_refused_for(ann: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    file = await upload(ann)
    assert refusal(await bob.post("/fine_tuning/dry_runs", json=body(file)), 404)["param"] == "training_file"
    error = refusal(await ann.post("/fine_tuning/dry_runs", json=body(file, max_length=513)), 400)
    assert error["param"] == "method.supervised.hyperparameters.max_length"


@pytest.mark.parametrize(("peft", "room"), [("lora", 512), ("prefix(300)", 212)])
async def test_a_job_that_does_not_say_has_all_the_positions_there_are(
    ann: httpx.AsyncClient, peft: str, room: int
) -> None:
    made = (await ann.post("/fine_tuning/jobs", json=body(await upload(ann), peft=peft))).json()
    assert made["method"]["supervised"]["hyperparameters"]["max_length"] == room


@pytest.mark.parametrize(("peft", "room"), [("lora", 101), ("prompt(4)", 97)])
async def test_a_job_that_does_not_say_has_the_rows_that_a_packs_memory_is_for(
    service: Service, peft: str, room: int
) -> None:
    limits = Limits(pack_bytes=PACK_BYTES, max_rows=100, row_bytes=1)
    transport = httpx.ASGITransport(create_app(replace(service.api, pack=limits)), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {service.keys['ann']}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", headers=headers) as client:
        file = await upload(client, jsonl(EXAMPLE, LONG))
        made = (await client.post("/fine_tuning/dry_runs", json=body(file, peft=peft))).json()
        assert made["max_length"] == room and made["training_file"]["cut"] == 1
        asked = (await client.post("/fine_tuning/dry_runs", json=body(file, peft=peft, max_length=400))).json()
        assert asked["max_length"] == 400 and asked["training_file"]["cut"] == 0

"""`/v1/fine_tuning/dry_runs`: what a job would be and what it would cut; `max_length` by default."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from polygraft.cluster.model import Limits
from polygraft.cluster.policy.budget import state_bytes
from polygraft.cluster.store import keys
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.grammar import parse
from polygraft.kernels.kv.cost import SCORE_BLOCK
from polygraft.serving.http import dry_runs
from polygraft.serving.http.app import create_app
from polygraft.serving.http.submission import Submission, new_job
from tests.serving.http.conftest import EXAMPLE, Service, jsonl, refusal, upload

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


async def test_a_file_that_is_deleted_while_it_is_counted_is_a_400(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await upload(ann)

    def checked(*asked: Any) -> Submission:
        made = new_job(*asked)
        (service.api.folders.files / f"{file}.jsonl").unlink()
        return made

    monkeypatch.setattr(dry_runs, "new_job", checked)
    error = refusal(await ann.post("/fine_tuning/dry_runs", json=body(file)), 400)
    assert error["message"] == f"training_file: the content of '{file}' is gone; upload it again"


@pytest.mark.parametrize(("peft", "room"), [("lora", 512), ("prefix(300)", 212)])
async def test_a_job_that_does_not_say_has_all_the_positions_there_are(
    ann: httpx.AsyncClient, peft: str, room: int
) -> None:
    asked = body(await upload(ann), peft=peft)
    assert (await ann.post("/fine_tuning/dry_runs", json=asked)).json()["max_length"] == room
    made = (await ann.post("/fine_tuning/jobs", json=asked)).json()
    assert made["method"]["supervised"]["hyperparameters"]["max_length"] is None


@asynccontextmanager
async def with_packs_of(service: Service, bytes: int) -> AsyncIterator[httpx.AsyncClient]:
    """Ann's client of a service whose packs have so much memory."""
    api = replace(service.api, pack=lambda _: Limits(pack_bytes=bytes))
    transport = httpx.ASGITransport(create_app(api), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {service.keys['ann']}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", headers=headers) as client:
        yield client


def needed(service: Service, peft: str, rows: int) -> int:
    """Bytes of a pack that holds a job alone in bf16 and computes one example of so many rows."""
    graft = BoundGraft(parse(peft), service.backbone.shape)
    return state_bytes(graft.parameters, graft.frozen) + StepCost(graft, 2, SCORE_BLOCK).bytes([rows])


@pytest.mark.parametrize("peft", ["lora(r=2)", "prompt(4)", "prefix(20)"])
async def test_a_job_that_does_not_say_has_as_much_as_a_packs_memory_has_room_for(service: Service, peft: str) -> None:
    least = needed(service, peft, 120)
    async with with_packs_of(service, least) as client:
        file = await upload(client, jsonl(EXAMPLE, LONG))
        made = (await client.post("/fine_tuning/dry_runs", json=body(file, peft=peft))).json()
    rows = made["max_length"] - 1
    assert needed(service, peft, rows) <= least < needed(service, peft, rows + 1) and rows >= 120
    assert made["training_file"]["cut"] == 1


@pytest.mark.parametrize("held_out", [False, True])
async def test_an_example_that_no_pack_has_memory_for_is_refused_with_its_line_and_the_numbers(
    service: Service, held_out: bool
) -> None:
    peft = "lora(r=2)"
    graft = BoundGraft(parse(peft), service.backbone.shape)

    def step(rows: int) -> int:
        return needed(service, peft, rows) - 16 * graft.parameters

    async with with_packs_of(service, needed(service, peft, 250)) as client:
        short, long = await upload(client), await upload(client, jsonl(EXAMPLE, LONG))
        files = {"training_file": short, "validation_file": long} if held_out else {"training_file": long}
        asked = {**body(short, peft=peft, max_length=400), **files}
        for path in ("/fine_tuning/jobs", "/fine_tuning/dry_runs"):
            error = refusal(await client.post(path, json=asked), 400)
            assert (error["param"], error["code"]) == (
                "validation_file" if held_out else "training_file",
                "invalid_file",
            )
            tokens = int(error["message"].partition(": line 2 has ")[2].split()[0])
            assert 300 < tokens < 400
            for bytes in (step(tokens - 1), step(250)):
                assert f"{bytes:,}" in error["message"]
        assert not list(service.api.store.scan(keys.JOBS))
        taken = await client.post(
            "/fine_tuning/jobs", json={**asked, **body(short, peft=peft, max_length=250), **files}
        )
        assert taken.status_code == 200


async def test_where_not_even_two_tokens_fit_a_job_that_does_not_say_is_refused_too(service: Service) -> None:
    async with with_packs_of(service, needed(service, "lora(r=2)", 1) - 1) as client:
        error = refusal(await client.post("/fine_tuning/jobs", json=body(await upload(client), peft="lora(r=2)")), 400)
    assert error["param"] == "training_file" and "line 1 has " in error["message"]

"""`/v1/searches`: begun once, seen by their tenant alone, told from the study's record."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.states import SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Write
from polygraft.serving.http.needed import searches_on
from polygraft.tuning.desk import read
from polygraft.tuning.record import decode, open_study
from polygraft.tuning.study import Failure, Result, Study
from tests.serving.http.conftest import CHOICES, LABELLED, Service, jsonl, refusal, upload

pytestmark = pytest.mark.anyio
SPACE = {"kind": "autopeft", "groups": 2, "largest": 4, "longest": 4}


async def asked(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The body of a search over two files."""
    files = [await upload(client), await upload(client)]
    body = {"name": "find", "training_file": files[0], "validation_file": files[1], "space": SPACE, "trials": 4}
    return {**body, **fields}


async def begun(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("/searches", json=await asked(client, **fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def study_of(service: Service, search: str) -> Study:
    found = service.api.store.get(keys.study(StudyId(search)))
    assert found is not None
    plan = decode(found.value.body).plan
    return open_study(service.api.store, StudyId(search), plan, tenant=TenantId("ann"), clock=lambda: 2.0)


def end(service: Service, search: str) -> None:
    found = service.api.store.get(keys.search(StudyId(search)))
    assert found is not None
    over = replace(found.value, state=SearchState.SUCCEEDED, finished_at=9.0)
    service.api.store.commit([Write(found.key, over, found.version)])


async def test_a_search_is_begun_with_its_plan_in_the_studys_record(service: Service, ann: httpx.AsyncClient) -> None:
    search = await begun(ann, sampler="lhs", pruner="halving", limits={"parameters": 5000})
    plan = study_of(service, search)
    assert plan.trials == () and plan.space.most == 5000
    shown = (await ann.get(f"/searches/{search}")).json()
    assert (shown["status"], shown["trials_total"], shown["trials"], shown["front"]) == ("running", 4, {}, [])
    assert shown["objectives"] == ["loss", "parameters"]


@pytest.mark.parametrize(
    "space",
    [
        {"kind": "which", "only": ["lora", "prefix"]},  # whose axes are there under conditions
        {"kind": "positions"},
        {"kind": "lora_ranks"},
        {"kind": "nls"},
        {"kind": "noah", "depths": 2},
        {"kind": "union", "terms": [{"method": "lora"}]},
    ],
    ids=str,
)
async def test_a_search_over_any_kind_of_space_is_shown_and_listed(ann: httpx.AsyncClient, space: Any) -> None:
    search = await begun(ann, space=space)
    assert [one["id"] for one in (await ann.get("/searches")).json()["data"]] == [search]


async def test_what_came_of_trials_is_told_as_the_record_has_it(service: Service, ann: httpx.AsyncClient) -> None:
    search = await begun(ann)
    study = study_of(service, search)
    for _ in range(3):
        study.ask()
    study.tell(0, Result(values=(2.0, 50.0), loss=2.0, job="ftjob-1"))
    study.tell(1, Failure(reason="loss is nan"))
    study.tell(2, Result(values=(1.0, 90.0), loss=1.0))
    study.ask()
    trials = (await ann.get(f"/searches/{search}/trials")).json()["data"]
    assert [(trial["number"], trial["state"], trial["loss"]) for trial in trials] == [
        (0, "complete", 2.0),
        (1, "failed", None),
        (2, "complete", 1.0),
        (3, "running", None),
    ]
    assert trials[3]["unseen"] == []
    again = [read({name: value for name, value in trial.items() if name not in ("id", "object")}) for trial in trials]
    assert [replace(trial, config=dict(trial.config)) for trial in again] == list(study.trials)
    front = (await ann.get(f"/searches/{search}/front")).json()["data"]
    assert [trial["number"] for trial in front] == [0, 2]
    shown = (await ann.get(f"/searches/{search}")).json()
    assert shown["trials"] == {"complete": 2, "failed": 1, "running": 1} and shown["front"] == [0, 2]
    second = (await ann.get(f"/searches/{search}/trials", params={"limit": 2, "after": trials[1]["id"]})).json()
    assert [trial["number"] for trial in second["data"]] == [2, 3] and not second["has_more"]


async def test_the_same_request_again_is_the_first_search(service: Service, ann: httpx.AsyncClient) -> None:
    body, header = await asked(ann), {"Idempotency-Key": "one"}
    first = (await ann.post("/searches", json=body, headers=header)).json()
    assert (await ann.post("/searches", json=body, headers=header)).json() == first
    other = await ann.post("/searches", json={**body, "trials": 5}, headers=header)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_conflict"
    assert [one["id"] for one in (await ann.get("/searches")).json()["data"]] == [first["id"]]


async def test_another_tenant_sees_nothing_of_it(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    search = await begun(ann)
    assert (await bob.get("/searches")).json()["data"] == []
    for path in ("", "/trials", "/front", "/events"):
        assert (await bob.get(f"/searches/{search}{path}")).status_code == 404
    assert (await bob.post(f"/searches/{search}/cancel")).status_code == 404
    stolen = await bob.post("/searches", json=await asked(ann))
    assert stolen.status_code == 404 and stolen.json()["error"]["param"] == "training_file"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"objectives": ["los"]}, "objectives: 'los' is unknown; choices: loss, parameters, bytes, decode_bytes"),
        ({"limits": {"parameters": 1}}, "most: no graft of the space has at most 1 trainable parameters; the smallest"),
        ({"space": {"kind": "which", "only": ["qlora"]}}, "space: qlora trains beside a quantised backbone"),
        ({"space": {"kind": "which", "only": ["lorra"]}}, "unknown method 'lorra'"),
        ({"space": {"kind": "nsa"}}, "nsa"),
        ({"space": {"kind": "autopeft", "widest": 3}}, "unknown field"),
        ({"sampler": "staged"}, "sampler: staged"),
        ({"sampler": "pbt", "seeds": 2}, "sampler: pbt"),
        ({"limits": {"latency": 5}}, "limits: 'latency' is unknown; choices: loss, parameters"),
        ({"limits": {"loss": 1.0}, "objectives": ["parameters"]}, "objectives: nothing of them is measured"),
        ({"space": {"kind": "s4", "most": 10}}, "most: no graft of S4's space has at most 10"),
        ({"space": {"kind": "positions", "most": 1}}, "most: no position has at most 1"),
        ({"space": {"kind": "nls", "at": "attn.kv"}}, "space: the backbone refuses lora"),
        ({"space": {"kind": "union", "terms": []}}, "terms"),
        ({"space": {"kind": "union", "terms": [{"method": "qlora"}]}}, "space: qlora trains beside a quantised"),
        ({"trials": 0}, "trials"),
        ({"trials": 10**12}, "trials: Input should be less than or equal to 10000"),
        ({"concurrency": 10**9}, "concurrency: Input should be less than or equal to 1000"),
        ({"startup": 10**9}, "startup: Input should be less than or equal to 10000"),
        ({"seeds": 10**9}, "seeds: Input should be less than or equal to 100"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**70}, "seed: Input should be less than 2147483648"),
        ({"hyperparameters": {"peft": "lora"}}, "peft"),
        ({"trails": 3}, "trails: unknown field"),
    ],
    ids=str,
)
async def test_a_search_that_cannot_be_run_is_refused_with_the_reason(
    service: Service, ann: httpx.AsyncClient, fields: dict[str, Any], wrong: str
) -> None:
    answer = await ann.post("/searches", json=await asked(ann, **fields))
    assert answer.status_code == 400 and wrong in answer.json()["error"]["message"], answer.text
    assert service.api.store.newest(keys.searches_of(TenantId("ann"))) == []


async def test_a_test_file_with_what_the_search_sees_is_refused(service: Service, ann: httpx.AsyncClient) -> None:
    """By its content, whatever its id."""
    same = await ann.post("/searches", json=await asked(ann, test_file=await upload(ann)))
    error = refusal(same, 400)
    assert error["param"] == "test_file" and "holds what the validation_file holds" in error["message"]
    other = await upload(ann, jsonl(CHOICES))
    assert (await ann.post("/searches", json=await asked(ann, test_file=other))).status_code == 200
    unknown = refusal(await ann.post("/searches", json=await asked(ann, test_file="file-none")), 404)
    assert unknown["param"] == "test_file"


async def test_a_score_that_the_validation_file_does_not_tell_is_refused_at_once(ann: httpx.AsyncClient) -> None:
    error = refusal(await ann.post("/searches", json=await asked(ann, objectives=["accuracy", "parameters"])), 400)
    assert error["param"] == "objectives" and "tells exact_match, score, token_f1" in error["message"]
    choices, texts = await upload(ann, jsonl(CHOICES)), await upload(ann, jsonl(*LABELLED))
    wanted = {"objectives": ["accuracy", "parameters"], "limits": {"accuracy": 0.5}}
    assert (await ann.post("/searches", json=await asked(ann, validation_file=choices, **wanted))).status_code == 200
    labelled = await asked(ann, type="classification", training_file=texts, validation_file=texts, **wanted)
    assert (await ann.post("/searches", json=labelled)).status_code == 200
    error = refusal(await ann.post("/searches", json={**labelled, "objectives": ["exact_match"], "limits": {}}), 400)
    assert "tells accuracy, macro_f1, score" in error["message"]


async def test_a_search_is_cancelled_once_and_not_after_its_end(service: Service, ann: httpx.AsyncClient) -> None:
    search = await begun(ann)
    for _ in range(2):
        assert (await ann.post(f"/searches/{search}/cancel")).json()["status"] == "cancelling"
    found = service.api.store.get(keys.search(StudyId(search)))
    assert found is not None and found.value.cancel_requested
    done = await begun(ann)
    end(service, done)
    answer = await ann.post(f"/searches/{done}/cancel")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "search_finished"


async def test_events_come_as_a_page_and_as_a_stream_that_ends_with_the_search(
    service: Service, ann: httpx.AsyncClient
) -> None:
    search = await begun(ann)
    for number in range(2):
        entry: dict[str, JSON] = {"message": f"trial {number} running", "at": 5.0, "trial": number}
        service.api.store.append(keys.search_log(StudyId(search)), entry)
    end(service, search)
    page = (await ann.get(f"/searches/{search}/events")).json()["data"]
    assert [(event["message"], event["trial"]) for event in page] == [("trial 0 running", 0), ("trial 1 running", 1)]
    after = (await ann.get(f"/searches/{search}/events", params={"after": page[0]["id"]})).json()["data"]
    assert after == page[1:]
    text = (await ann.get(f"/searches/{search}/events", params={"stream": True})).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert [json.loads(line) for line in lines[:-1]] == page and lines[-1] == "[DONE]"


async def test_a_stream_of_events_goes_on_after_the_one_that_was_seen_last(
    service: Service, ann: httpx.AsyncClient
) -> None:
    search = await begun(ann)
    for number in range(30):
        service.api.store.append(keys.search_log(StudyId(search)), {"message": f"{number}", "at": 5.0, "trial": number})
    end(service, search)
    page = (await ann.get(f"/searches/{search}/events", params={"limit": 30})).json()["data"]
    asks = {"stream": True, "after": page[3]["id"]}
    lines = (await ann.get(f"/searches/{search}/events", params=asks)).text.split("\n\n")
    assert [json.loads(line.removeprefix("data: ")) for line in lines[:-2]] == page[4:]
    for unknown in ("", "0-0", "7-none"):
        answer = await ann.get(f"/searches/{search}/events", params={"stream": True, "after": unknown})
        assert refusal(answer, 400)["param"] == "after"


async def test_a_tenant_has_only_so_many_searches_at_once(service: Service, ann: httpx.AsyncClient) -> None:
    body = await asked(ann)
    for _ in range(8):
        assert (await ann.post("/searches", json=body)).status_code == 200
    answer = await ann.post("/searches", json=body)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_searches"


async def test_a_search_starts_from_what_was_best_in_an_earlier_one_of_the_tenant(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    first = await begun(ann)
    study = study_of(service, first)
    for loss in (2.0, 1.0):
        study.tell(study.ask().number, Result(values=(loss, 50.0), loss=loss))
    for asks in ("auto", first):
        plan = study_of(service, await begun(ann, warm_start=asks))
        assert plan.ask().config == study.trials[1].config
    stolen = await bob.post("/searches", json=await asked(bob, warm_start=first))
    assert refusal(stolen, 404)["param"] == "warm_start"
    found = service.api.store.get(keys.study(StudyId(await begun(bob, warm_start="auto"))))
    assert found is not None and decode(found.value.body).plan.warm.configs == ()


async def test_what_a_running_search_needs_is_not_deleted(service: Service, ann: httpx.AsyncClient) -> None:
    """Between its trials' jobs, too, of which there is none here."""
    service.publish("ann", "lora(r=2)", "net")
    service.publish("ann", "lora(r=2)", "net", 2)
    asks = await asked(ann, supernet="net@1", test_file=await upload(ann, jsonl(CHOICES)))
    search = (await ann.post("/searches", json=asks)).json()["id"]
    needed = [f"/files/{asks[name]}" for name in ("training_file", "validation_file", "test_file")] + ["/grafts/net@1"]
    for thing in needed:
        assert f"search {search}" in refusal(await ann.delete(thing), 409)["message"]
    assert searches_on(service.api, "tiny") == 1
    end(service, search)
    assert searches_on(service.api, "tiny") == 0
    for thing in needed:
        assert (await ann.delete(thing)).status_code == 200


async def test_a_search_on_a_backbone_that_is_not_there_is_refused_with_those_that_are(ann: httpx.AsyncClient) -> None:
    error = refusal(await ann.post("/searches", json=await asked(ann, model="none")), 404)
    assert error["param"] == "model" and "it has tiny" in error["message"]


async def test_streams_of_events_take_their_tenants_turns(service: Service, ann: httpx.AsyncClient) -> None:
    """So many that each of the tenant's turns is taken: they wait, and whoever they are not of does not."""
    search = await begun(ann)
    stream = {"stream": True}
    async with asyncio.TaskGroup() as group, AsyncExitStack() as turns:
        for _ in range(4):
            await turns.enter_async_context(service.api.turns.of(TenantId("ann")))
        answer = group.create_task(ann.get(f"/searches/{search}/events", params=stream))
        async with service.as_("bob") as bob:
            assert (await bob.get("/searches")).status_code == 200
        assert not answer.done()
        end(service, search)
        await turns.aclose()
        assert (await answer).text.endswith("[DONE]\n\n")


async def test_a_search_over_a_supernet_that_is_not_there_is_refused(ann: httpx.AsyncClient) -> None:
    answer = await ann.post("/searches", json=await asked(ann, supernet="net"))
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "supernet"

"""`/metrics`, as Prometheus's own parser reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import DeviceJoined, JobCancelled, PackOpening, ReplicaOpened
from polygraft.cluster.model import Device, DeviceId, PackId, Replica, ReplicaId
from polygraft.cluster.states import Reason
from polygraft.serving.http.app import create_app
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from tests.serving.http.conftest import Service, refusal, upload

pytestmark = pytest.mark.anyio
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
Labels = frozenset[tuple[str, str]]


async def scraped(client: httpx.AsyncClient) -> dict[str, dict[Labels, float]]:
    """Samples by name, without the prefix, and labels."""
    answer = await client.get("http://test/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[Labels, float]] = {}
    for family in parser.text_string_to_metric_families(answer.text):
        assert family.documentation and family.name.startswith("polygraft:")
        for sample in family.samples:
            same = found.setdefault(sample.name.removeprefix("polygraft:"), {})
            assert frozenset(sample.labels.items()) not in same, sample
            same[frozenset(sample.labels.items())] = sample.value
    return found


def of(samples: Mapping[Labels, float], **labels: str) -> float:
    """The sum of those that have the labels."""
    return sum(value for found, value in samples.items() if found >= set(labels.items()))


async def test_requests_are_counted_by_how_they_end(service: Service, ann: httpx.AsyncClient) -> None:
    whole = (await ann.post("/chat/completions", json=CHAT)).json()
    await ann.post("/chat/completions", json={**CHAT, "stream": True})
    text = whole["choices"][0]["message"]["content"]
    await ann.post("/chat/completions", json={**CHAT, "max_tokens": 50, "stop": text[1:3]})
    refusal(await ann.post("/completions", json={"model": "tiny", "prompt": [512], "add_special_tokens": False}), 400)
    refusal(await ann.post("/completions", json={"model": "none", "prompt": "a"}), 404)
    refusal(await ann.get("/nothing/of/this/name"), 404)
    found = await scraped(ann)
    own = {"model_name": "tiny", "ingress": "i0"}
    ends = found["request_success_total"]
    assert {reason: of(ends, finished_reason=reason, **own) for reason in ("length", "stop", "error")} == {
        "length": 2,
        "stop": 1,
        "error": 1,
    }
    prompt = whole["usage"]["prompt_tokens"]
    assert of(found["prompt_tokens_total"], **own) == 3 * prompt
    told = of(found["generation_tokens_total"], **own)
    assert 8 < told < 58
    assert of(found["time_to_first_token_seconds_count"], **own) == 3
    assert of(found["inter_token_latency_seconds_count"], **own) == told - 3
    assert of(found["request_time_per_output_token_seconds_count"], **own) == 3
    assert of(found["e2e_request_latency_seconds_count"], **own) == of(found["request_generation_tokens_count"]) == 4
    assert of(found["e2e_request_latency_seconds_sum"]) >= of(found["time_to_first_token_seconds_sum"]) > 0
    answers = found["http_requests_total"]
    assert of(answers, handler="/v1/chat/completions", method="POST", status="200") == 3
    assert (
        of(answers, handler="/v1/completions", status="400")
        == of(answers, handler="/v1/completions", status="404")
        == 1
    )
    assert of(answers, handler="other", status="404") == 1 and "nothing" not in str(found)


async def test_a_client_that_leaves_is_an_abort(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.engine, "_step_floor_s", 0.05)  # so that it is not answered before it has left
    wanted = {"model": "tiny", "prompt": "a", "max_tokens": 140, "ignore_eos": True}
    asked = asyncio.create_task(ann.post("/completions", json=wanted))
    while not service.engine.load.running:
        await asyncio.sleep(0.005)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    async with asyncio.timeout(10.0):  # who left is noticed a moment later
        while "request_success_total" not in (found := await scraped(ann)):
            await asyncio.sleep(0.005)
    assert of(found["request_success_total"], finished_reason="abort") == 1


async def test_replicas_say_what_they_hold_and_have_done(service: Service, ann: httpx.AsyncClient) -> None:
    grafts = [service.publish("ann", "lora(r=2)", name, version) for name, version in (("one", 1), ("two", 2))]
    for model in ("one", "two", "one"):
        await ann.post("/chat/completions", json={**CHAT, "model": model})
    found = await scraped(ann)
    own = {"model_name": "tiny", "replica": "r0"}
    assert of(found["resident_grafts"], **own) == of(found["graft_loads_total"], **own) == 2
    assert of(found["resident_graft_bytes"], **own) > 0 and of(found["graft_load_seconds_total"], **own) > 0
    assert of(found["engine_steps_total"], **own) >= 12 and of(found["engine_step_seconds_total"], **own) > 0
    assert of(found["request_queue_time_seconds_count"], **own) == 3
    assert of(found["num_requests_running"], **own) == of(found["num_requests_waiting"], **own) == 0
    assert of(found["kv_cache_usage_perc"], **own) == 0
    assert {dict(labels)["reason"] for labels in found["num_requests_waiting_by_reason"]} == {"capacity", "deferred"}
    for name in ("one", "two", *(graft.id for graft in grafts), "ann", service.keys["ann"]):
        assert f'"{name}' not in (await ann.get("http://test/metrics")).text


async def test_waits_are_told_apart_and_reach_an_ingress_without_requests(
    service: Service, ann: httpx.AsyncClient
) -> None:
    """More streams than places; a second ingress hears of them though none is its own."""
    heard: list[Any] = []
    service.engine.listen("i1", lambda tokens, load: heard.append((tokens, load)))
    prompts = ["a", "b", "c", "d", "e", "f"]
    await ann.post("/completions", json={"model": "tiny", "prompt": prompts, "max_tokens": 140, "ignore_eos": True})
    for _ in range(300):
        if heard and heard[-1][1].tally.steps and not heard[-1][1].running:
            break
        await asyncio.sleep(0.01)
    assert all(not tokens for tokens, _ in heard)
    assert heard[-1][1] == service.engine.load and len(heard) < 20
    assert max(load.waiting for _, load in heard) <= 2


async def test_the_control_plane_is_counted_by_state_and_reason(service: Service, ann: httpx.AsyncClient) -> None:
    store, now = service.api.store, [2_000.0]
    overview = Overview(store, lambda: now[0])
    transport = httpx.ASGITransport(create_app(replace(service.api, overview=overview)), raise_app_exceptions=False)
    cpu = Device(id=DeviceId("n/cpu0"), node="n", kind="cpu", index=0, cores=2, bytes=1_000, speed=0.0)
    gpu = replace(cpu, id=DeviceId("n/cuda0"), kind="cuda", bytes=9_000)
    replica = Replica(id=ReplicaId("r0"), backbone="tiny", devices=(gpu.id,), bytes=4_000, actor="a", opened_at=2_000.0)
    opening = PackOpening(
        pack=PackId("p"),
        backbone="tiny",
        devices=(cpu.id, gpu.id),
        bytes=600,
        epoch=1,
        reason=Reason.JOBS_WAIT,
        at=2_010.0,
    )
    joined = [DeviceJoined(record=device, at=2_000.0) for device in (cpu, gpu)]
    store.commit([], [*joined, ReplicaOpened(record=replica, at=2_000.0)])
    file = await upload(ann)
    jobs = [
        (await ann.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file})).json()["id"] for _ in "abc"
    ]
    advance_job(store, JobCancelled(job=jobs[0], at=2_001.0))
    store.commit([], [opening])
    now[0] = 2_040.0
    async with httpx.AsyncClient(transport=transport, headers=ann.headers) as client:
        found = await scraped(client)
        now[0] = 2_050.0
        later = await scraped(client)
    assert of(found["jobs"], state="queued") == 2 and of(found["jobs"], state="running") == 0
    assert of(found["jobs_finished_total"], state="cancelled", ingress="i0") == 1
    assert of(found["jobs_finished_total"], state="succeeded") == 0
    assert of(found["packs"], state="opening") == 1
    assert {dict(labels)["reason"] for labels in found["jobs_waiting_by_reason"]} == {str(one) for one in Reason}
    assert (of(found["devices"], kind="cpu"), of(found["devices"], kind="cuda")) == (1, 1)
    assert (of(found["device_bytes"], kind="cuda"), of(found["device_free_bytes"], kind="cuda")) == (9_000, 4_400)
    assert of(found["replicas"], model_name="tiny") == 1
    assert (of(found["device_seconds_total"], use="replica"), of(found["device_seconds_total"], use="pack")) == (40, 60)
    assert (of(later["device_seconds_total"], use="replica"), of(later["device_seconds_total"], use="pack")) == (50, 80)


async def test_only_who_may_see_all_tenants_together_reads_it(service: Service, bob: httpx.AsyncClient) -> None:
    assert refusal(await bob.get("http://test/metrics"), 403)["type"] == "permission_error"
    async with service.as_(None) as nobody:
        refusal(await nobody.get("http://test/metrics"), 401)


async def test_openmetrics_is_given_to_who_asks_for_it(ann: httpx.AsyncClient) -> None:
    await ann.post("/chat/completions", json=CHAT)
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = await ann.get("http://test/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = [family.name for family in openmetrics.text_string_to_metric_families(answer.text)]
    assert "polygraft:request_success" in names and "polygraft:num_requests_running" in names


async def test_several_ingresses_export_their_own(service: Service, ann: httpx.AsyncClient) -> None:
    other = create_app(replace(service.api, meters=Meters("i1")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(other), headers=ann.headers) as client:
        await client.post("http://test/v1/chat/completions", json=CHAT)
        await ann.post("/chat/completions", json=CHAT)
        await ann.post("/chat/completions", json=CHAT)
        theirs, ours = await scraped(client), await scraped(ann)
    assert of(theirs["request_success_total"], ingress="i1") == of(theirs["request_success_total"]) == 1
    assert of(ours["request_success_total"], ingress="i0") == of(ours["request_success_total"]) == 2
    assert theirs["engine_steps_total"] == ours["engine_steps_total"]

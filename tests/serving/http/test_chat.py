"""`/v1/chat/completions`: whole and streamed answers, and everything that is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.text.message import Message
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.http.generations import ChatCompletionRequest
from polygraft.serving.messages import Draining, Load, StepMessage
from polygraft.serving.request import GenerationRequest
from tests.serving.http.apis import knowing
from tests.serving.http.conftest import SETTINGS, Service, counts, refusal, usage
from tests.serving.naive import Solo, random_tensors
from tests.serving.test_published_once import Scripted

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "What is a graft?"}]


def body(model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": ASK, "max_tokens": 12, "temperature": 0, **fields}


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def frames(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_an_answer_has_openais_shape(service: Service, ann: httpx.AsyncClient) -> None:
    answer = (await ann.post("/chat/completions", json=body())).json()
    prompt = service.backbone.tokeniser.encode_chat([Message("user", "What is a graft?")], add_generation_prompt=True)
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["created"] == 1000
    assert answer["usage"] == usage(len(prompt), 12)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
    assert answer["id"].startswith("chatcmpl-") and answer["system_fingerprint"].startswith("fp_")


async def test_a_graft_answers_as_the_graft_alone(service: Service, ann: httpx.AsyncClient) -> None:
    graft = service.publish("ann", "prefix(4) + lora(r=4)", "poems")
    tokeniser, shape = service.backbone.tokeniser, service.backbone.shape
    from polygraft.grafts.grammar import parse

    bound = BoundGraft(parse(graft.method), shape)
    solo = Solo(service.engine._backbone.folder, shape, bound, random_tensors(bound, 1))
    prompt = tokeniser.encode_chat([Message("user", "What is a graft?")], add_generation_prompt=True)
    expected = tokeniser.decode([*prompt, *solo.greedy(prompt, 12)]).removeprefix(tokeniser.decode(prompt))
    together = await asyncio.gather(
        *(ann.post("/chat/completions", json=body(model)) for model in ("poems", "tiny", "poems@1"))
    )
    assert text_of(together[0]) == text_of(together[2]) == expected != text_of(together[1])
    assert counts(together[0].json()) == counts(together[1].json())  # virtual tokens are nobody's


async def test_a_stream_begins_with_the_role_and_says_what_a_whole_answer_says(ann: httpx.AsyncClient) -> None:
    whole = await ann.post("/chat/completions", json=body())
    answer = await ann.post("/chat/completions", json=body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = frames(answer)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text_of(whole)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)


async def test_usage_comes_last_in_a_stream_that_asks_for_it(ann: httpx.AsyncClient) -> None:
    whole = (await ann.post("/chat/completions", json=body())).json()
    chunks = frames(await ann.post("/chat/completions", json=body(stream=True, stream_options={"include_usage": True})))
    assert chunks[-1]["choices"] == [] and counts(chunks[-1]) == counts(whole)
    assert all(c["usage"] is None for c in chunks[:-1])


async def test_usage_says_of_a_tenants_own_prompts_what_was_computed_before_and_nothing_of_anothers(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    """Of the bare backbone, which both ask the same; each model of a tenant's is by itself, too."""
    service.publish("ann", "prompt(4)", "poems")

    async def cached(client: httpx.AsyncClient, model: str = "tiny", **fields: Any) -> int:
        answer = await client.post("/chat/completions", json=body(model, max_tokens=1, **fields))
        told = frames(answer)[-1] if fields else answer.json()
        prompt, found = told["usage"]["prompt_tokens"], told["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert told["usage"] == usage(prompt, 1, found)
        return int(found) + 1 - prompt  # 0 where all is but its newest token

    streamed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    first = await cached(ann)
    assert first < -16 and await cached(ann) > first
    assert await cached(bob) == first and await cached(ann, "poems") == first
    assert await cached(bob) == await cached(ann, **streamed) == await cached(ann) > first


async def test_a_stop_string_ends_the_text_before_it_however_tokens_fall(ann: httpx.AsyncClient) -> None:
    text = text_of(await ann.post("/chat/completions", json=body()))
    stop = text[5:8]
    for stream in (False, True):
        answer = await ann.post("/chat/completions", json=body(stop=[stop, "never said"], stream=stream))
        if stream:
            chunks = frames(answer)
            said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            said, reason = text_of(answer), answer.json()["choices"][0]["finish_reason"]
            assert answer.json()["usage"]["completion_tokens"] < 12
        assert said == text[: text.index(stop)] and reason == "stop"
    assert text_of(await ann.post("/chat/completions", json=body(stop="never said"))) == text


async def test_a_seed_makes_sampling_repeatable(ann: httpx.AsyncClient) -> None:
    asked = body(temperature=1.5, max_tokens=20)
    texts = [text_of(await ann.post("/chat/completions", json={**asked, "seed": seed})) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = {text_of(await ann.post("/chat/completions", json=asked)) for _ in range(3)}
    assert len(free) == 3  # no seed: a new one each time


async def test_both_names_of_the_token_limit_work(ann: httpx.AsyncClient) -> None:
    for limit in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        answer = (await ann.post("/chat/completions", json=body(**limit))).json()
        assert answer["usage"]["completion_tokens"] == 3
    unlimited = (await ann.post("/chat/completions", json=body(max_tokens=None))).json()
    assert unlimited["usage"]["total_tokens"] == SETTINGS.max_context  # it says no end of its own before that
    assert unlimited["choices"][0]["finish_reason"] == "length"


async def test_messages_may_be_parts_and_have_openais_newer_role(ann: httpx.AsyncClient) -> None:
    old = [{"role": "system", "content": "Be kind."}, *ASK]
    new = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "What is a graft?", "name": "ann"},
    ]
    answers = [await ann.post("/chat/completions", json=body(messages=messages)) for messages in (old, new)]
    assert text_of(answers[0]) == text_of(answers[1])


def test_every_field_that_the_stock_client_can_send_is_known() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    sent = {*CompletionCreateParamsBase.__annotations__, "stream"}
    assert sent <= ChatCompletionRequest.model_fields.keys()


NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "n": 1,
    "logprobs": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "modalities": ["text"],
}


async def test_fields_that_change_nothing_are_accepted(ann: httpx.AsyncClient) -> None:
    assert (await ann.post("/chat/completions", json=body(**NEUTRAL))).status_code == 200  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("grafts", [{"name": "a", "weight": 1}]),
        ("functions", [{}]),
        ("audio", {}),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", "x"),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("colour", "red"),
        ("stream_options", {"colour": "red"}),
    ],
)
async def test_what_is_not_supported_is_400_and_names_the_field(
    ann: httpx.AsyncClient, field: str, value: object
) -> None:
    error = refusal(await ann.post("/chat/completions", json=body(**{field: value})), 400)  # type: ignore[arg-type]
    assert str(error["param"]).split(".")[0] == field and field in error["message"]


@pytest.mark.parametrize(
    ("message", "param", "choices"),
    [
        ({"content": "x", "foo": 1}, "messages.0.foo", "annotations, audio, content"),
        ({"content": [{"type": "text", "text": "x", "foo-bar": 1}]}, "messages.0.content.0.foo-bar", "text, type"),
        ({"content": "x", "int": 1}, "messages.0.int", "annotations, audio, content"),
    ],
)
async def test_an_unknown_field_inside_a_message_is_named_with_the_choices_there(
    ann: httpx.AsyncClient, message: dict[str, object], param: str, choices: str
) -> None:
    asked = body(messages=[{"role": "user", **message}])
    error = refusal(await ann.post("/chat/completions", json=asked), 400)
    assert error["param"] == param and f"{param}: unknown field (got 1); choices: {choices}" in error["message"]


async def test_half_of_a_surrogate_pair_is_400_and_a_whole_one_is_a_character(ann: httpx.AsyncClient) -> None:
    async def said(text: str) -> httpx.Response:
        asked = json.dumps(body(messages=[{"role": "user", "content": "?"}])).replace("?", text)
        return await ann.post("/chat/completions", content=asked)

    error = refusal(await said(r"a\ud800b"), 400)
    assert error["param"] == "messages.0.content" and "half of a surrogate pair" in error["message"]
    assert (await said(r"a\ud83d\ude00b")).status_code == 200


async def test_two_different_token_limits_are_refused(ann: httpx.AsyncClient) -> None:
    error = refusal(await ann.post("/chat/completions", json=body(max_completion_tokens=5)), 400)
    assert error["param"] == "max_completion_tokens"


async def test_an_unknown_model_or_another_tenants_is_404(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("bob", "ia3", "secrets")
    for model in ("gpt-4", "secrets", "secrets@1", "tiny@1", "../tiny", ""):
        assert refusal(await ann.post("/chat/completions", json=body(model)), 404)["param"] == "model"


async def test_a_context_overflow_is_400_and_counts_virtual_tokens(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "prefix(100)", "wide")
    error = refusal(
        await ann.post("/chat/completions", json=body(messages=[{"role": "user", "content": "a b " * 200}])), 400
    )
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    error = refusal(await ann.post("/chat/completions", json=body(max_tokens=159)), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens" and "160" in error["message"]
    assert (await ann.post("/chat/completions", json=body(max_tokens=100))).status_code == 200
    assert (
        "100 virtual" in refusal(await ann.post("/chat/completions", json=body("wide", max_tokens=100)), 400)["message"]
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_context_overflow_that_only_the_engine_sees_is_400_too(
    service: Service, ann: httpx.AsyncClient, stream: bool
) -> None:
    """The record of an imported graft may be older than the field, and describe it in words."""
    graft = replace(service.publish("ann", "prefix(100)", "wide"), method="somebody's prefix", context_length=0)
    service.api.store.commit([Write(keys.graft(graft.tenant, graft.name, graft.version), graft, None)])
    error = refusal(await ann.post("/chat/completions", json=body("wide", max_tokens=100, stream=stream)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "the context is 160" in error["message"]


async def test_the_virtual_tokens_of_an_imported_graft_are_those_of_its_record(
    service: Service, ann: httpx.AsyncClient
) -> None:
    graft = replace(service.publish("ann", "prefix(100)", "wide"), method="somebody's prefix")
    service.api.store.commit([Write(keys.graft(graft.tenant, graft.name, graft.version), graft, None)])
    assert (
        "100 virtual" in refusal(await ann.post("/chat/completions", json=body("wide", max_tokens=100)), 400)["message"]
    )


async def test_a_graft_for_another_backbone_is_400(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "ia3", "foreign", backbone="f" * 64)
    assert "backbone" in refusal(await ann.post("/chat/completions", json=body("foreign")), 400)["message"]


async def test_a_graft_whose_files_are_gone_fails_its_own_request_only(
    service: Service, ann: httpx.AsyncClient
) -> None:
    graft = service.publish("ann", "ia3", "lost")
    (service.api.folders.grafts / graft.id / "graft.safetensors").unlink()
    answers = await asyncio.gather(
        ann.post("/chat/completions", json=body("lost")), ann.post("/chat/completions", json=body())
    )
    assert refusal(answers[0], 500)["code"] == "generation_failed"
    assert answers[1].status_code == 200
    refusal(await ann.post("/chat/completions", json=body("lost", stream=True)), 500)


async def test_full_queues_are_429_with_retry_after(service: Service, ann: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(ann.post("/chat/completions", json=body(max_tokens=100)) for _ in range(12)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= 4 and statuses.count(429) >= 1 and set(statuses) <= {200, 429}
    busy = next(answer for answer in answers if answer.status_code == 429)
    assert refusal(busy, 429)["code"] == "overloaded" and busy.headers["retry-after"] == "1"


async def test_no_replica_is_503(service: Service, ann: httpx.AsyncClient) -> None:
    nowhere = replace(service.backbone, gateway=Gateway({}, ingress="i1", settings=SETTINGS, ready_s=0.05))
    transport = httpx.ASGITransport(create_app(knowing(service.api, nowhere)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", headers=ann.headers) as client:
        answer = await client.post("/chat/completions", json=body())
    assert refusal(answer, 503)["code"] == "unavailable" and answer.headers["retry-after"]


async def test_a_last_replica_that_drains_is_503_with_retry_after(service: Service, ann: httpx.AsyncClient) -> None:
    class Going(Scripted):
        async def submit(self, request: GenerationRequest) -> Draining:  # type: ignore[override]
            return Draining()

        async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
            yield StepMessage((), Load(blocks=9, free_blocks=9), draining=True)
            await asyncio.sleep(30)

    gateway = Gateway({ReplicaId("r"): Going()}, ingress="i1", settings=SETTINGS, ready_s=0.05)
    here = replace(service.backbone, gateway=gateway)
    transport = httpx.ASGITransport(create_app(knowing(service.api, here)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", headers=ann.headers) as client:
        answer = await client.post("/chat/completions", json=body())
    assert refusal(answer, 503)["code"] == "unavailable" and answer.headers["retry-after"]
    await gateway.close()


async def idle(service: Service) -> bool:
    for _ in range(200):
        if not service.engine.load.running and not service.engine.load.waiting:
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_ends_its_generation(service: Service, stream: bool) -> None:
    """Drives the ASGI application as a server does that loses its client after the first bytes, or while it waits."""
    sent = json.dumps(body(stream=stream, max_tokens=100, messages=ASK)).encode()
    started = asyncio.Event()
    bodies = iter([{"type": "http.request", "body": sent, "more_body": False}])

    async def receive() -> dict[str, object]:
        if (first := next(bodies, None)) is not None:
            return first
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            started.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {service.keys['ann']}".encode())],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    steps = service.api.data / "replicas/r0/steps.jsonl"

    async def after_a_step() -> None:
        while not steps.exists():
            await asyncio.sleep(0.005)
        started.set()

    if not stream:
        waiting = asyncio.ensure_future(after_a_step())
    await service.transport.app(scope, receive, send)  # type: ignore[arg-type]
    if not stream:
        await waiting
    assert await idle(service)
    assert len(steps.read_text().splitlines()) < 90  # 100 tokens were asked for

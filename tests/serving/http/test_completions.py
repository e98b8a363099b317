"""`/v1/completions`, and the sampling fields that it shares with chat."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from polygraft.serving.http.generations import CompletionRequest
from tests.serving.http.conftest import SETTINGS, Service, counts, refusal, usage
from tests.serving.naive import Solo

pytestmark = pytest.mark.anyio
TEXT = "What is a graft?"
CHAT = [{"role": "user", "content": TEXT}]


def body(prompt: object = TEXT, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}


async def texts(client: httpx.AsyncClient, asked: dict[str, Any]) -> list[str]:
    answer = await client.post("/completions", json=asked)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


async def chunks(client: httpx.AsyncClient, asked: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await client.post("/completions", json={**asked, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_a_text_is_gone_on_with_as_the_model_alone_does(service: Service, ann: httpx.AsyncClient) -> None:
    answer = (await ann.post("/completions", json=body())).json()
    tokeniser, shape = service.backbone.tokeniser, service.backbone.shape
    prompt = tokeniser.encode_text(TEXT)
    said = Solo(service.engine._backbone.folder, shape, None, {}).greedy(prompt, 12)
    expected = tokeniser.decode([*prompt, *said]).removeprefix(tokeniser.decode(prompt))
    assert answer["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == usage(len(prompt), 12)
    assert (answer["object"], answer["model"], answer["created"]) == ("text_completion", "tiny", 1000)
    assert answer["id"].startswith("cmpl-") and answer["system_fingerprint"].startswith("fp_")


async def test_a_prompt_may_be_its_token_ids(service: Service, ann: httpx.AsyncClient) -> None:
    ids = list(service.backbone.tokeniser.encode_text(TEXT))
    bare = list(service.backbone.tokeniser.encode_text(TEXT, special=False))
    assert await texts(ann, body(ids)) == await texts(ann, body())
    assert await texts(ann, body(bare)) == await texts(ann, body(add_special_tokens=False))


async def test_each_of_several_prompts_is_answered_as_it_is_alone(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "lora(r=4)", "poems")
    prompts = ["A", "Once upon a time", TEXT, "A", "one two three", "x"]  # more than there are streams
    for fields in ({"model": "poems"}, {"temperature": 1.2, "seed": 5}):
        together = await texts(ann, body(prompts, **fields))
        assert together == [(await texts(ann, body(prompt, **fields)))[0] for prompt in prompts]
    ids = [list(service.backbone.tokeniser.encode_text(prompt)) for prompt in prompts]
    assert await texts(ann, body(ids)) == await texts(ann, body(prompts))


async def test_a_stream_says_what_a_whole_answer_says_of_every_prompt(ann: httpx.AsyncClient) -> None:
    for prompt in (TEXT, [TEXT, "Once"]):
        asked = body(prompt, stream_options={"include_usage": True})
        whole = (await ann.post("/completions", json=body(prompt))).json()
        found = await chunks(ann, asked)
        for index, choice in enumerate(whole["choices"]):
            own = [one["choices"][0] for one in found if one["choices"] and one["choices"][0]["index"] == index]
            assert "".join(one["text"] for one in own) == choice["text"]
            assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["length"]
        assert found[-1]["choices"] == [] and counts(found[-1]) == counts(whole)
        assert all(one["usage"] is None for one in found[:-1])
        assert {one["object"] for one in found} == {"text_completion"} and len({one["id"] for one in found}) == 1
    assert all("usage" not in one for one in await chunks(ann, body()))


async def test_what_was_computed_before_of_several_prompts_is_counted_together(ann: httpx.AsyncClient) -> None:
    known = list(range(3, 43))
    await ann.post("/completions", json=body(known))
    for prompt, cached in (([*known, 3], 40), ([known, [9], known, [*known[:20], 9, 9]], 39 + 39 + 20)):
        several = prompt if isinstance(prompt[0], list) else [prompt]
        asked = body(prompt, stream_options={"include_usage": True})
        expected = usage(sum(map(len, several)), 12 * len(several), cached)
        assert (await chunks(ann, asked))[-1]["usage"] == expected


async def test_without_a_limit_a_text_has_sixteen_tokens(ann: httpx.AsyncClient) -> None:
    asked = {"model": "tiny", "prompt": TEXT, "ignore_eos": True}
    assert (await ann.post("/completions", json=asked)).json()["usage"]["completion_tokens"] == 16


async def test_stop_strings_count_once_there_are_the_fewest_tokens(ann: httpx.AsyncClient) -> None:
    (text,) = await texts(ann, body())
    stop = text[2:4]
    assert await texts(ann, body(stop=stop)) == [text[: text.index(stop)]]
    (late,) = await texts(ann, body(stop=stop, min_tokens=6))
    assert text.startswith(late) and len(late) > text.index(stop) + len(stop)
    assert await texts(ann, body(stop=stop, min_tokens=12)) == [text]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
async def test_sampling_fields_reach_the_engine_in_both_forms(ann: httpx.AsyncClient, path: str) -> None:
    def asked(**fields: Any) -> dict[str, Any]:
        prompt = {"messages": CHAT} if "chat" in path else {"prompt": TEXT}
        return {"model": "tiny", "max_tokens": 12, "temperature": 1.8, **prompt, **fields}

    async def said(**fields: Any) -> str:
        answer = await ann.post(path, json=asked(**fields))
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if "chat" in path else choice["text"])

    greedy = await said(temperature=0)
    assert await said(top_k=1) == await said(min_p=1.0) == await said(top_p=0.0) == greedy
    drawn = await said(seed=4)
    assert drawn == await said(seed=4, top_k=0) == await said(seed=4, top_k=-1, min_p=0.0) != greedy
    for wrong in ({"top_k": -2}, {"min_p": 1.1}, {"min_p": -0.1}, {"min_tokens": -1}, {"ignore_eos": "yes"}):
        error = refusal(await ann.post(path, json=asked(**wrong)), 400)
        assert error["param"] == next(iter(wrong))
    assert refusal(await ann.post(path, json=asked(min_tokens=13)), 400)["param"] == "min_tokens"
    for _ in range(3):
        answer = (await ann.post(path, json=asked(ignore_eos=True, min_tokens=12, repetition_penalty=1.0))).json()
        assert answer["usage"]["completion_tokens"] == 12


def test_every_field_that_the_stock_client_can_send_is_known() -> None:
    from openai.types.completion_create_params import CompletionCreateParamsBase

    sent = {*CompletionCreateParamsBase.__annotations__, "stream"}
    assert sent <= CompletionRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True),
        ("logprobs", 0),
        ("logprobs", 5),
        ("n", 2),
        ("best_of", 2),
        ("suffix", "."),
        ("repetition_penalty", 1.2),
        ("stop_token_ids", [3]),
        ("max_tokens", 0),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 3]),
        ("prompt", [3, -1]),
        ("prompt", [True]),
        ("prompt", ["a"] * 129),
        ("prompt", [512]),
        ("prompt", {"text": "a"}),
        ("colour", "red"),
    ],
)
async def test_what_is_not_supported_is_400_and_names_the_field(
    ann: httpx.AsyncClient, field: str, value: object
) -> None:
    error = refusal(await ann.post("/completions", json=body(**{field: value, "add_special_tokens": False})), 400)
    assert str(error["param"]).split(".")[0] == field and field in error["message"]


async def test_a_text_that_is_too_long_is_400_and_names_what_to_change(ann: httpx.AsyncClient) -> None:
    error = refusal(await ann.post("/completions", json=body(["a", "a b " * 200])), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = refusal(await ann.post("/completions", json=body(max_tokens=SETTINGS.max_context)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


async def test_one_prompt_that_fails_fails_its_request_and_leaves_nothing_behind(
    service: Service, ann: httpx.AsyncClient
) -> None:
    """The second names a token that the backbone does not have, which the engine finds."""
    error = refusal(await ann.post("/completions", json=body([[5, 6], [511, 512]], max_tokens=150)), 400)
    assert (error["code"], error["param"]) == ("unknown_token", "prompt")
    assert len(await texts(ann, body())) == 1
    for _ in range(500):
        if not service.backbone.gateway._streams and not service.engine.load.running:
            break
        await ann.get("/models")
    assert not service.backbone.gateway._streams and not service.engine.load.running


async def test_more_prompts_than_there_are_places_are_429(ann: httpx.AsyncClient) -> None:
    answer = await ann.post("/completions", json=body(["a"] * 40))
    assert refusal(answer, 429)["code"] == "overloaded" and answer.headers["retry-after"]


async def test_an_unknown_model_is_404(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("bob", "ia3", "secrets")
    for model in ("gpt-4", "secrets", "tiny@1"):
        assert refusal(await ann.post("/completions", json=body(model=model)), 404)["param"] == "model"

"""The API client against canned answers of the real shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.service import Service, ServiceNotRunning, announce, find_service, read_key

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "status": "running",
    "model": "smollm2",
    "created_at": 1,
    "step": 3,
    "steps_total": 9,
}


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client("http://service", "pg-key", transport=httpx.MockTransport(answer))


def test_every_call_carries_the_key() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=JOB)

    assert client(answer).job("ftjob-1").step == 3
    assert seen[0].headers["Authorization"] == "Bearer pg-key"
    assert str(seen[0].url) == "http://service/v1/fine_tuning/jobs/ftjob-1"


def test_a_refusal_carries_openais_error_object() -> None:
    error = {"message": "suffix: too long", "type": "invalid_request_error", "param": "suffix", "code": "invalid_value"}
    with pytest.raises(ApiFailure, match="suffix: too long") as caught:
        client(lambda _: httpx.Response(400, json={"error": error})).create_job({})
    failure = caught.value
    assert (failure.status, failure.kind, failure.param, failure.code) == (
        400,
        "invalid_request_error",
        "suffix",
        "invalid_value",
    )


def test_a_refusal_that_is_not_json_is_still_told() -> None:
    with pytest.raises(ApiFailure, match="HTTP 502: bad gateway"):
        client(lambda _: httpx.Response(502, text="bad gateway")).job("ftjob-1")


def test_nobody_listening_means_that_no_service_is_running() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(ServiceNotRunning, match="nothing answers at http://service"):
        client(answer).models()


def test_a_busy_service_is_asked_again_when_that_changes_nothing() -> None:
    answers = [httpx.Response(503, headers={"Retry-After": "0"}), httpx.Response(200, json=JOB)]
    assert client(lambda _: answers.pop(0)).job("ftjob-1").id == "ftjob-1"


def test_a_submission_without_an_idempotency_key_is_never_sent_twice() -> None:
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.method)
        return httpx.Response(503, headers={"Retry-After": "0"}, json={"error": {"message": "the store is down"}})

    with pytest.raises(ApiFailure, match="the store is down"):
        client(answer).create_job({"model": "smollm2"})
    assert sent == ["POST"]


def test_lists_are_read_page_after_page() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params.get("after", "0").removeprefix("ftjob-"))
        data = [{**JOB, "id": f"ftjob-{n}"} for n in range(start + 1, start + 3)]
        return httpx.Response(200, json={"object": "list", "data": data, "has_more": start < 4})

    assert [job.id for job in client(answer).jobs()] == [f"ftjob-{n}" for n in range(1, 7)]
    assert len(list(client(answer).jobs(limit=4))) == 4


def test_wait_returns_the_final_job_and_shows_the_way_there() -> None:
    states = ["queued", "running", "failed"]
    seen: list[RemoteJob] = []
    answer = {**JOB, "error": {"code": "non_finite_loss", "message": "loss is NaN", "param": None}}
    job = client(lambda _: httpx.Response(200, json={**answer, "status": states.pop(0)})).wait(
        "ftjob-1", seen.append, period_s=0
    )
    assert [one.status for one in seen] == ["queued", "running", "failed"]
    assert job.error is not None and job.error.message == "loss is NaN"


def test_an_upload_sends_the_file_and_its_purpose(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"messages": []}\n')

    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        assert b'filename="train.jsonl"' in body and b'{"messages": []}' in body and b"fine-tune" in body
        return httpx.Response(200, json={"id": "file-1", "filename": "train.jsonl", "bytes": 17, "created_at": 1})

    assert client(answer).upload(path).id == "file-1"


def test_a_chat_answer_arrives_piece_by_piece() -> None:
    frames = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")] + [{"choices": []}]
    text = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n"
    pieces = client(lambda _: httpx.Response(200, text=text)).chat(
        "m", [{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert list(pieces) == ["Hel", "lo"]


def test_an_error_in_the_middle_of_a_chat_answer_is_raised() -> None:
    error = '{"error": {"message": "the replica died", "type": "server_error"}}'
    text = f'data: {{"choices": [{{"delta": {{"content": "He"}}}}]}}\n\ndata: {error}\n\n'
    pieces = client(lambda _: httpx.Response(200, text=text)).chat(
        "m", [{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert next(pieces) == "He"
    with pytest.raises(ApiFailure, match="the replica died"):
        next(pieces)


def test_the_service_file_is_private_and_comes_back_as_written(tmp_path: Path) -> None:
    service = Service(
        url="http://127.0.0.1:8000",
        backbone="smollm2",
        backbone_folder="backbones/smollm2",
        store_url="redis://:secret@127.0.0.1:6379/0",
        ray_address="127.0.0.1:6380",
        ray_namespace="polygraft-1",
        ray_token="token",
        pid=1,
        started=2.5,
    )
    path = tmp_path / "run" / "service.json"
    announce(path, service)
    assert find_service(path) == service
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_service_file_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ServiceNotRunning, match="polygraft up"):
        find_service(tmp_path / "run" / "service.json")
    with pytest.raises(ServiceNotRunning, match="polygraft up"):
        read_key(tmp_path / "api_key")


@pytest.mark.parametrize("id", ["", ".", ".."])
def test_an_id_that_would_be_another_path_is_not_asked_for(id: str) -> None:
    with pytest.raises(ApiFailure, match="does not exist") as caught:
        client(lambda _: pytest.fail("asked")).job(id)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (200, "<html>", "answers as no service"),
        (200, "{}", "answers as no service of this version does: id: Field required"),
        (307, "", "HTTP 307"),
    ],
)
def test_whoever_answers_otherwise_than_a_service_is_told_so(status: int, text: str, told: str) -> None:
    asked = client(lambda _: httpx.Response(status, text=text))
    with pytest.raises(ApiFailure, match=told):
        asked.job("ftjob-1")
    with pytest.raises(ApiFailure):
        list(asked.jobs())


def test_numbers_that_json_has_not_are_not_sent() -> None:
    asked = client(lambda _: pytest.fail("asked"))
    for number in (float("nan"), float("inf")):
        with pytest.raises(ApiFailure, match="nan or infinity"):
            asked.create_job({"hyperparameters": {"learning_rate": number}})
        with pytest.raises(ApiFailure, match="nan or infinity"):
            next(asked.chat("mine", [], max_tokens=1, temperature=number))


@pytest.mark.parametrize(("url", "key"), [("http://[::1", "pg-key"), ("http://service", "é"), ("http://s", "a\nb")])
def test_an_address_or_key_that_cannot_be_is_refused_and_no_key_is_told(url: str, key: str) -> None:
    with pytest.raises(ApiFailure) as caught:
        Client(url, key)
    assert key not in str(caught.value)

"""The service on Ray Serve, over HTTP with the stock OpenAI client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from ray import serve

from polygraft.cluster.api_keys import create_key
from polygraft.cluster.backbones import put_backbone
from polygraft.cluster.model import Alias, Graft, GraftId, TenantId
from polygraft.cluster.settings import ServeSettings, Settings
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.launch.engines import DeployBackbone
from polygraft.serving.candidate import candidate
from polygraft.serving.http.listener import Listener
from polygraft.serving.ingress import IngressPlan, ingress_app
from tests.ray.local import free_port, local_ray, write_devices
from tests.serving.naive import Solo, random_tensors
from tests.tiny import tiny_llama

METHODS = ("lora(r=4)", "ia3", "prefix(5)", "serial(4)")
ASK = "What is a graft?"
TOKENS = 24
SLOW_BODIES = 1_050


def published(store: Store, data: Path, folder: Path, shape: ModelShape) -> dict[str, str]:
    """One graft a method, and what each model, alone and by hooks, answers to ASK."""
    tokeniser = Tokeniser.load(folder)
    prompt = tokeniser.encode_chat([Message("user", ASK)], add_generation_prompt=True)
    tenant = TenantId("ann")
    answers = {}
    for seed, text in enumerate(("", *METHODS)):
        bound = BoundGraft(parse(text), shape) if text else None
        values = random_tensors(bound, seed) if bound else {}
        said = Solo(folder, shape, bound, values).greedy(prompt, TOKENS)
        end = next((i for i, id in enumerate(said) if id in tokeniser.eos_ids), TOKENS)
        whole = tokeniser.decode([*prompt, *said[:end]]).removeprefix(tokeniser.decode(prompt))
        answers[f"g{seed}" if text else "tiny"] = whole
        if bound:
            of = fingerprint(folder)
            id = native.save(data / "grafts", bound, values, backbone=of)
            graft = Graft(
                tenant=tenant,
                name=f"g{seed}",
                version=1,
                id=GraftId(id),
                method=bound.spec.method,
                backbone_fingerprint=of,
                parameters=1,
                bytes=1,
                context_length=bound.context_length,
                created_at=1.0,
            )
            alias = Alias(tenant=tenant, name=graft.name, version=1, latest=1)
            writes = [
                Write(keys.graft(tenant, graft.name, 1), graft, 0),
                Write(keys.alias(tenant, graft.name), alias, 0),
            ]
            store.commit(writes)
    return answers


async def streamed(client: openai.AsyncOpenAI, model: str) -> str:
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": ASK}], max_tokens=TOKENS, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def burst(client: openai.AsyncOpenAI, models: list[str]) -> list[str]:
    return await asyncio.gather(*(streamed(client, model) for model in models))


def pid_of(words: str) -> int:
    """The process with these words in its command line."""
    for process in psutil.Process().children(recursive=True):
        if words in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError(f"no {words} is alive")


@pytest.mark.timeout(300)
def test_the_stock_client_is_served_mixed_streams_over_http(tmp_path: Path) -> None:
    folder, data = tiny_llama(tmp_path / "tiny"), tmp_path / "data"
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        answers = published(store, data, folder, shape)
        _, key = create_key(store, tenant=TenantId("ann"), name="test", at=0.0)
        _, other = create_key(store, tenant=TenantId("bob"), name="test", at=0.0)
        settings = Settings(
            home=tmp_path / "home",
            data=data,
            backbone="tiny",
            store_url=server.url,
            dtype="fp32",
            serve=ServeSettings(max_context=256, kv_bytes=8 << 20),
        )
        port = free_port()
        with local_ray({}):
            write_devices(store, 1)
            serve.start(proxy_location="Disabled")
            door = tmp_path / "door"
            listener = Listener("127.0.0.1", port, door)
            url = f"http://127.0.0.1:{port}"
            record = candidate(str(folder), tmp_path, None).backbone(
                "tiny", dtype="fp32", quantise=None, at=time.time(), asked=True
            )
            put_backbone(store, record, at=record.added_at)
            serve.run(ingress_app(IngressPlan(settings=settings, cache=tmp_path, door=door)), name="polygraft")
            DeployBackbone.of(settings)(record)
            until_healthy(url)
            try:
                check(url, key, answers, data, tmp_path)
                nobody_waits_for_bodies_that_never_end(port, other, key)
            finally:
                serve.shutdown()
                listener.close()
        store.close()


def check(url: str, key: str, answers: dict[str, str], data: Path, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        assert {model.id for model in client.models.list()} >= answers.keys()
        refused = openai.OpenAI(base_url=f"{url}/v1", api_key="pg-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            refused.models.list()
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])

        line = {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": "A shoot."}]}
        (tmp_path / "train.jsonl").write_text(f"{json.dumps(line)}\n" * 8)
        file = client.files.create(file=tmp_path / "train.jsonl", purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="poems")
        assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
        assert [one.id for one in client.fine_tuning.jobs.list()] == [job.id]
        assert client.fine_tuning.jobs.cancel(job.id).id == job.id
        assert client.files.content(file.id).read() == (tmp_path / "train.jsonl").read_bytes()

    models = [*answers] * 3
    with asyncio.Runner() as runner:
        talker = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        assert runner.run(burst(talker, models)) == [answers[model] for model in models]
        steps = read_steps(data)
        decode = [step for step in steps if step["prefill_rows"] == 0]
        assert max(len(step["grafts"]) for step in decode) == 4 and max(len(step["methods"]) for step in decode) == 4  # type: ignore[arg-type]

        hang_up(url, key)
        after = wait_quiet(data)
        assert len(after) - len(steps) < 150  # 200 tokens were asked for and one was waited for

        # A replica killed in the middle of a burst: the streams go on at its successor with the tokens they would have
        # had.
        async def killed() -> list[str]:
            work = asyncio.create_task(burst(talker, models))
            before = len(read_steps(data))
            while len(read_steps(data)) < before + 5:
                await asyncio.sleep(0.01)
            os.kill(pid_of("ray::Host"), signal.SIGKILL)
            return await work

        watches = pid_of("ServeReplica:backbone-tiny:engine")
        assert runner.run(killed()) == [answers[model] for model in models]
        assert pid_of("ServeReplica:backbone-tiny:engine") == watches, "it started another engine itself"

        lose_the_ingress(url, key)
        assert runner.run(burst(talker, models)) == [answers[model] for model in models]
        runner.run(talker.close())


def nobody_waits_for_bodies_that_never_end(port: int, slow: str, key: str) -> None:
    """One tenant begins more requests than a server takes on at a time, and ends none."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
    begun = f"{head}Authorization: Bearer {slow}\r\n\r\n{{".encode()
    with ExitStack() as held, httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=30) as other:
        for number in range(SLOW_BODIES):
            held.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(begun)
            if number % 30 == 29:
                at = time.monotonic()
                assert other.get("/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
                assert time.monotonic() - at < 2.0, number


def lose_the_ingress(url: str, key: str) -> None:
    """A stream whose ingress dies ends with a protocol error, never as if it were whole; another takes its place, and
    answers who has asked meanwhile."""
    body = {"model": "g1", "messages": [{"role": "user", "content": ASK}], "max_tokens": 200, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as answer:
        pieces = answer.iter_bytes()
        said = next(pieces)
        os.kill(pid_of("ServeReplica:polygraft:ingress"), signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012  (whatever comes before the end is read)
            for piece in pieces:
                said += piece
    assert answer.status_code == 200 and b"[DONE]" not in said and b'"finish_reason":"' not in said
    assert httpx.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == 200
    until_healthy(url)


def until_healthy(url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("no ingress and replica came up")


def hang_up(url: str, key: str) -> None:
    """Ask for a long stream and leave after its first bytes."""
    body = {"model": "g1", "messages": [{"role": "user", "content": ASK}], "max_tokens": 200, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as answer:
        next(answer.iter_bytes())


def read_steps(data: Path) -> list[dict[str, object]]:
    """Of all replicas that there were."""
    logs = sorted((data / "replicas").glob("backbone-tiny-*/steps.jsonl"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def wait_quiet(data: Path) -> list[dict[str, object]]:
    """The step log once nothing has been computed for a second."""
    steps: list[dict[str, object]] = []
    while len(found := read_steps(data)) != len(steps):
        steps = found
        time.sleep(1)
    return steps

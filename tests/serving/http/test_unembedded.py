"""A token that the tokenizer has and the backbone has not: a chat is a 400, a job is refused with line and token."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from polygraft.cluster.store import keys
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.http.app import create_app
from tests.serving.http.apis import knowing
from tests.serving.http.conftest import EXAMPLE, Service, jsonl, refusal, upload

pytestmark = pytest.mark.anyio
POISON = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y <NEW> z"}]}


@pytest.fixture
async def client(service: Service, folder: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    copy = shutil.copytree(folder, tmp_path / "resized", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["<NEW>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    api = knowing(service.api, replace(service.backbone, tokeniser=Tokeniser.load(copy)))
    headers = {"Authorization": f"Bearer {service.keys['ann']}"}
    transport = httpx.ASGITransport(create_app(api), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", headers=headers) as client:
        yield client


async def test_a_job_with_such_a_token_is_refused_with_line_and_token(
    service: Service, client: httpx.AsyncClient
) -> None:
    good, bad = await upload(client), await upload(client, jsonl(EXAMPLE, POISON))
    for files in ({"training_file": bad}, {"training_file": good, "validation_file": bad}):
        error = refusal(await client.post("/fine_tuning/jobs", json={"model": "tiny", **files}), 400)
        assert error["param"] == list(files)[-1]
        assert 'line 2: "<NEW>" is token 512, for which the backbone has no embedding' in error["message"]
    assert not list(service.api.store.scan(keys.JOBS))


async def test_a_chat_with_such_a_token_is_refused(client: httpx.AsyncClient) -> None:
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "say <NEW>"}], "max_tokens": 3}
    error = refusal(await client.post("/chat/completions", json=ask), 400)
    assert error["param"] == "messages" and '"<NEW>" is token 512' in error["message"]
    ask["messages"] = [{"role": "user", "content": "say it"}]
    assert (await client.post("/chat/completions", json=ask)).status_code == 200

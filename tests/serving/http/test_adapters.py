"""vLLM's way to load and unload adapters at run time, and that it loses nothing that was trained here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from polygraft.cluster.model import JobId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from tests.serving.http.conftest import Service, refusal
from tests.serving.naive import Solo, random_tensors

pytestmark = pytest.mark.anyio


def adapter(service: Service, seed: int) -> tuple[str, list[str]]:
    """A folder under a root of the service, and what the model says with it."""
    root = service.api.data / "root"
    bound = BoundGraft(parse("lora(r=2)"), service.backbone.shape)
    values = random_tensors(bound, seed)
    id = native.save(root, bound, values, backbone=service.backbone.fingerprint)
    tokeniser = service.backbone.tokeniser
    prompt = tokeniser.encode_text("Once")
    said = Solo(service.engine._backbone.folder, service.backbone.shape, bound, values).greedy(prompt, 6)
    return str(root / id), [tokeniser.decode([*prompt, *said]).removeprefix(tokeniser.decode(prompt))]


async def texts(client: httpx.AsyncClient, model: str) -> list[str]:
    body = {"model": model, "prompt": "Once", "max_tokens": 6, "temperature": 0}
    answer = await client.post("/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


async def test_an_adapter_is_loaded_replaced_and_unloaded(service: Service, ann: httpx.AsyncClient) -> None:
    (one, ones), (two, twos) = adapter(service, 1), adapter(service, 2)
    loaded = await ann.post("/load_lora_adapter", json={"lora_name": "sql", "lora_path": one})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert await texts(ann, "sql") == ones
    again = {"lora_name": "sql", "lora_path": two}
    assert refusal(await ann.post("/load_lora_adapter", json=again), 400)["code"] == "already_loaded"
    assert (await ann.post("/load_lora_adapter", json={**again, "load_inplace": True})).status_code == 200
    assert await texts(ann, "sql") == twos != ones == await texts(ann, "sql@1")
    gone = await ann.post("/unload_lora_adapter", json={"lora_name": "sql"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert [model["id"] for model in (await ann.get("/models")).json()["data"]] == ["tiny"]
    assert not list(service.api.folders.grafts.iterdir()) and Path(one).is_dir()
    assert refusal(await ann.post("/unload_lora_adapter", json={"lora_name": "sql"}), 404)["param"] == "lora_name"
    assert (await ann.post("/load_lora_adapter", json=again)).status_code == 200  # its numbers are not given out again
    assert [model["id"] for model in (await ann.get("/models")).json()["data"]] == ["tiny", "sql", "sql@3"]


async def test_a_folder_elsewhere_and_a_name_that_no_graft_can_have_are_400(
    service: Service, ann: httpx.AsyncClient, tmp_path: Path
) -> None:
    folder, _ = adapter(service, 1)
    (tmp_path / "root" / "out").symlink_to("/etc")
    for path in ("/etc", f"{folder}/../../keys", str(tmp_path / "root" / "out"), f"{folder}/none", "a\0b", "x" * 4000):
        error = refusal(await ann.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": path}), 400)
        assert error["param"] == "lora_path" and error["message"].startswith("lora_path: ")
    for name in ("tiny", "A b", "", "a@1"):
        error = refusal(await ann.post("/load_lora_adapter", json={"lora_name": name, "lora_path": folder}), 400)
        assert error["param"] == "lora_name" and error["message"].startswith("lora_name: ")


async def test_what_was_trained_here_is_not_unloaded_nor_is_another_tenants(
    service: Service, ann: httpx.AsyncClient
) -> None:
    graft = service.publish("ann", "ia3", "poems")
    key = keys.graft(graft.tenant, "poems", 1)
    service.api.store.commit([Write(key, replace(graft, job=JobId("ftjob-1")), None)])
    error = refusal(await ann.post("/unload_lora_adapter", json={"lora_name": "poems"}), 409)
    assert error["code"] == "trained_here" and (await ann.get("/models/poems")).status_code == 200
    service.publish("bob", "ia3", "secrets")
    refusal(await ann.post("/unload_lora_adapter", json={"lora_name": "secrets"}), 404)

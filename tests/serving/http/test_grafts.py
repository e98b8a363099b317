"""`/v1/grafts`: grafts made elsewhere, their versions, and what protects those that are needed."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import JobCancelled
from polygraft.cluster.model import GraftId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.text.message import Message
from polygraft.serving.adoption import Adoption, Busy, ReaderPlan, Refused, Saved
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.generate import tokens_of
from tests.serving.engines import request
from tests.serving.http.conftest import LIMITS, Service, refusal, upload
from tests.serving.naive import random_tensors

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "What is a graft?"}]


def archived(folder: Path, *, zipped: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(folder, folder.name)
    return gzip.compress(out.getvalue()) if zipped else out.getvalue()


def lora(backbone: Path, folder: Path, seed: int) -> list[int]:
    """A folder of PEFT's own making; the tokens that its model says greedily, on the prompt of ASK."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32), config).eval()
    model.save_pretrained(folder)  # type: ignore[arg-type]
    from polygraft.grafts.text.tokenise import Tokeniser

    prompt = Tokeniser.load(backbone).encode_chat([Message("user", ASK[0]["content"])], add_generation_prompt=True)
    said = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(prompt) :]


async def sent(client: httpx.AsyncClient, content: bytes, name: str, **fields: str) -> httpx.Response:
    return await client.post("/grafts", files={"file": ("graft.tar", content)}, data={"name": name, **fields})


async def says(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "messages": ASK, "max_tokens": 6, "temperature": 0}
    answer = await client.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


async def test_a_graft_of_pefts_lives_through_its_versions(
    service: Service, folder: Path, tmp_path: Path, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    tokeniser = service.backbone.tokeniser
    said = [tokeniser.decode(lora(folder, tmp_path / f"theirs{seed}", seed)) for seed in (1, 2, 3)]
    content = [archived(tmp_path / f"theirs{seed}", zipped=seed == 1) for seed in (1, 2, 3)]

    made = (await sent(ann, content[0], "poems")).json()
    assert {name: made[name] for name in ("id", "object", "name", "version", "current", "backbone", "job")} == {
        "id": "poems@1",
        "object": "graft",
        "name": "poems",
        "version": 1,
        "current": True,
        "backbone": "tiny",
        "job": None,
    }
    tensors = load_file(tmp_path / "theirs1/adapter_model.safetensors")
    assert made["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert not (await sent(ann, content[1], "poems", promote="false")).json()["current"]
    assert await says(ann, "poems") == said[0] and await says(ann, "poems@2") == said[1]
    assert (await sent(ann, content[2], "poems", promote="true")).json()["current"]
    assert await says(ann, "poems") == said[2]
    listed = (await ann.get("/grafts?name=poems&limit=2")).json()
    assert [(one["id"], one["current"]) for one in listed["data"]] == [("poems@1", False), ("poems@2", False)]
    assert [one["id"] for one in (await ann.get("/grafts?after=poems@2")).json()["data"]] == ["poems@3"]

    for back in ("poems@2", "poems@1"):
        assert (await ann.post("/grafts/poems/rollback")).json()["id"] == back
    assert await says(ann, "poems") == said[0]
    assert refusal(await ann.post("/grafts/poems/rollback"), 409)["code"] == "no_version_before"
    assert (await ann.post("/grafts/poems@3/promote")).json()["current"]
    assert (await ann.get("/grafts/poems")).json()["id"] == "poems@3"

    # What comes out goes in again, as the same graft; its files go with the last version of it, whoever has it.
    exported = await ann.get("/grafts/poems@1/export")
    assert exported.headers["content-type"] == "application/x-tar"
    again = (await sent(bob, exported.content, "mine")).json()
    assert again["id"] == "mine@1" and again["graft"] == made["graft"] and await says(bob, "mine") == said[0]
    theirs = await ann.get("/grafts/poems@1/export?format=peft")
    with tarfile.open(fileobj=io.BytesIO(theirs.content)) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "LORA"
    kept = service.api.folders.grafts / made["graft"]
    assert (await ann.delete("/grafts/poems@1")).json() == {"id": "poems@1", "object": "graft", "deleted": True}
    refusal(await ann.get("/grafts/poems@1"), 404)
    assert kept.is_dir()
    assert (await bob.delete("/grafts/mine@1")).status_code == 200
    assert not kept.exists() and (await bob.get("/grafts")).json()["data"] == []
    assert not any((service.api.folders.files / ".incoming").iterdir())


async def test_what_is_no_graft_for_this_backbone_is_refused_and_leaves_nothing(
    service: Service, tmp_path: Path, ann: httpx.AsyncClient
) -> None:
    bound = BoundGraft(parse("ia3"), service.backbone.shape)
    id = native.save(tmp_path / "foreign", bound, random_tensors(bound, 0), backbone="another")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    save_file({"x": torch.zeros(1)}, tmp_path / "odd/adapter_model.safetensors")
    for folder, said in ((f"foreign/{id}", "another"), ("pickled", "safetensors"), ("odd", "missing or unknown")):
        error = refusal(await sent(ann, archived(tmp_path / folder), "poems"), 400)
        assert error["code"] == "invalid_graft" and said in error["message"], error
        assert str(tmp_path) not in error["message"]
    assert (await ann.get("/grafts")).json()["data"] == []
    assert not service.api.folders.grafts.exists() and not any((service.api.folders.files / ".incoming").iterdir())

    # A graft that an operator has put under a root is read where it is.
    root = tmp_path / "root"
    own = native.save(root, bound, random_tensors(bound, 0), backbone=service.backbone.fingerprint)
    (root / "out").symlink_to(tmp_path / "odd")
    asked = {"path": str(root / own), "name": "poems"}
    assert (await ann.post("/grafts/import", json=asked)).json()["id"] == "poems@1"
    for path in (tmp_path / "odd", root / "out", root / ".." / "odd", root / "none", "", "x" * 5_000, "a\0b"):
        refusal(await ann.post("/grafts/import", json={"path": str(path), "name": "poems"}), 400)


@pytest.mark.parametrize(
    ("content", "fields", "param", "status"),
    [
        (b"no archive", {"name": "poems"}, "file", 400),
        (bytes(LIMITS.graft_bytes + 100_000), {"name": "poems"}, "file", 413),
        (gzip.compress(bytes(4_000_000)), {"name": "poems"}, "file", 413),
        (b"", {"name": "Poems"}, "name", 400),
        (b"", {"name": "tiny"}, "name", 400),
        (b"", {}, "name", 400),
        (b"", {"name": "poems", "promote": "maybe"}, "promote", 400),
        (b"", {"name": "poems", "colour": "red"}, "colour", 400),
    ],
)
async def test_an_upload_that_is_wrong_says_which_field_is(
    service: Service, ann: httpx.AsyncClient, content: bytes, fields: dict[str, str], param: str, status: int
) -> None:
    answer = await ann.post("/grafts", files={"file": ("graft.tar", content)}, data=fields)
    assert refusal(answer, status)["param"] == param
    assert not any(path.is_file() for path in service.api.folders.files.rglob("*"))


async def test_a_version_that_is_needed_is_not_deleted(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = service.publish("ann", "lora(r=2)", "poems"), service.publish("ann", "lora(r=2)", "poems", 2)
    assert refusal(await ann.delete("/grafts/poems@2"), 409)["code"] == "graft_in_use"  # what the name means
    file = await upload(ann)
    hyperparameters = {"peft": "lora(r=2) + from(of=poems@1)"}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = await ann.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file, "method": method})
    assert job.status_code == 200, job.text
    assert job.json()["id"] in refusal(await ann.delete("/grafts/poems@1"), 409)["message"]
    advance_job(service.api.store, JobCancelled(job=job.json()["id"], at=1.0))
    monkeypatch.setattr(Gateway, "used", {("ann", first.id)})
    assert "generating" in refusal(await ann.delete("/grafts/poems@1"), 409)["message"]
    monkeypatch.undo()
    stream = keys.demand(service.backbone.name)
    said: dict[str, JSON] = {"ingress": "another", "streams": 1, "waiting": 0}
    service.api.store.append(stream, {**said, "grafts": [["ann", first.id]]})
    assert "generating" in refusal(await ann.delete("/grafts/poems@1"), 409)["message"]
    service.api.store.append(stream, {**said, "grafts": []})
    assert (await ann.delete("/grafts/poems@1")).status_code == 200
    assert (await ann.delete("/grafts/poems@2")).status_code == 200  # the last one
    assert not (service.api.folders.grafts / second.id).exists()
    refusal(await ann.post("/chat/completions", json={"model": "poems", "messages": ASK}), 404)


async def test_another_tenants_grafts_are_not_there(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    service.publish("ann", "ia3", "poems")
    for method, path in (
        ("GET", "poems"),
        ("GET", "poems@1"),
        ("GET", "poems@1/export"),
        ("DELETE", "poems@1"),
        ("DELETE", "poems"),
        ("POST", "poems@1/promote"),
        ("POST", "poems/promote"),
        ("POST", "poems/rollback"),
    ):
        refusal(await bob.request(method, f"/grafts/{path}"), 404)
    assert (await bob.get("/grafts")).json()["data"] == []
    assert [one["id"] for one in (await ann.get("/grafts")).json()["data"]] == ["poems@1"]


async def test_names_and_versions_are_not_taken_for_each_other(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "prefix(2)", "poems")
    for method, path in (("DELETE", "poems"), ("POST", "poems/promote"), ("POST", "poems@1/rollback")):
        assert refusal(await ann.request(method, f"/grafts/{path}"), 400)["param"] == "id"
    assert refusal(await ann.get("/grafts/poems/export?format=gguf"), 400)["param"] == "format"
    for path in ("tiny", "poems@2", "poems@0", "x y", "%00"):
        refusal(await ann.get(f"/grafts/{path}"), 404)


async def test_a_graft_whose_files_are_gone_says_so(service: Service, ann: httpx.AsyncClient) -> None:
    graft = service.publish("ann", "ia3", "poems")
    for path in (service.api.folders.grafts / graft.id).iterdir():
        path.unlink()
    assert refusal(await ann.get("/grafts/poems/export"), 404)["code"] == "content_gone"


async def test_the_files_come_back_to_who_publishes_the_same_graft_while_they_are_deleted(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin's record is written between the look for others and the removal."""
    from polygraft.kernels.common import atomic
    from polygraft.serving.http import grafts

    graft, bound = service.publish("ann", "ia3", "poems"), BoundGraft(parse("ia3"), service.backbone.shape)
    moved: list[Path] = []

    def meanwhile(source: Path, target: Path) -> None:
        atomic.move(source, target)
        if not moved:
            moved.append(target)
            service.record("bob", GraftId(graft.id), "twin", bound=bound, backbone=service.backbone.fingerprint)

    monkeypatch.setattr(grafts, "move", meanwhile)
    assert (await ann.delete("/grafts/poems@1")).status_code == 200
    assert (service.api.folders.grafts / graft.id / "graft.json").is_file() and not moved[0].exists()


async def test_a_reader_that_takes_too_long_is_killed_and_the_next_folder_is_read(
    folder: Path, service: Service, tmp_path: Path
) -> None:
    bound = BoundGraft(parse("ia3"), service.backbone.shape)
    own = tmp_path / native.save(tmp_path, bound, random_tensors(bound, 0), backbone=service.backbone.fingerprint)
    plan = ReaderPlan(backbone_folder=folder, quantise=None, memory_bytes=1 << 30, seconds=0.05)
    hurried, tenant = Adoption(plan), TenantId("ann")
    for _ in range(2):
        with pytest.raises(Refused, match="more than 0 s"):
            await hurried.read(tenant, own, tmp_path / "saved")
    await hurried.close()
    reading = [asyncio.ensure_future(service.backbone.adoption.read(tenant, own, tmp_path / "saved")) for _ in range(3)]
    done = await asyncio.gather(*reading, return_exceptions=True)
    assert [type(one) for one in done] == [Saved, Saved, Busy] and done[0].graft == own.name  # type: ignore[union-attr]


async def test_a_graft_that_is_deleted_while_it_is_asked_is_not_there(service: Service) -> None:
    """It was looked up just before, and has neither a record nor files when the engine wants it."""
    wanted = replace(request("a", (5, 6, 7), 3), graft=GraftId("gone"))
    with pytest.raises(ApiError) as caught:
        await anext(tokens_of(service.api, service.backbone, wanted, "messages"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")

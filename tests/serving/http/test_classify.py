"""`/classify`: the probabilities of transformers' model for sequences under PEFT, whoever shares the steps; and who is
refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polygraft.cluster.model import GraftId
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from tests.grafts.oracle.row import random_tensors
from tests.serving.http.conftest import SETTINGS, Service, refusal

pytestmark = pytest.mark.anyio
LABELS = ("bad", "fair", "good")
TEXTS = ["a sweet fruit", "What is a graft? " * 6]  # more rows than a step has
GRAFTS = {"kinds": "lora(r=2, at=attn.q)", "others": "lora(r=4, alpha=8, at=attn.*|ffn.*)"}


def publish(service: Service, folder: Path, name: str, text: str) -> Path:
    """One that classifies; returns its folder, which PEFT reads."""
    bound = BoundGraft(replace(parse(text), head=Head(LABELS)), service.backbone.shape)
    values = {one: value.float() for one, value in random_tensors(bound, len(text)).items()}
    root, of = service.api.folders.grafts, service.backbone.fingerprint
    id = GraftId(native.save(root, bound, values, backbone=of, backbone_files=BackboneFiles(folder)))
    service.record("ann", id, name, bound=bound, backbone=of)
    return root / id


def expected(folder: Path, graft: Path) -> list[list[float]]:
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(plain, str(graft)).eval(), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in TEXTS]


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("http://test/classify", json=body)


async def test_texts_have_the_probabilities_that_pefts_model_gives_them_beside_others_and_chats(
    service: Service, ann: httpx.AsyncClient, folder: Path
) -> None:
    folders = {name: publish(service, folder, name, text) for name, text in GRAFTS.items()}
    service.publish("ann", "ia3", "poems")
    chat = {"model": "poems", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
    said = (await ann.post("/chat/completions", json=chat)).json()["choices"]
    together = await asyncio.gather(
        ann.post("/chat/completions", json=chat), *(ask(ann, model=f"{name}@1", input=TEXTS) for name in GRAFTS)
    )
    assert together[0].json()["choices"] == said
    for name, answer in zip(GRAFTS, together[1:], strict=True):
        told, right = answer.json(), expected(folder, folders[name])
        assert (told["object"], told["model"]) == ("list", f"{name}@1")
        assert [one["index"] for one in told["data"]] == [0, 1]
        for one, probabilities in zip(told["data"], right, strict=True):
            assert one["probs"] == pytest.approx(probabilities, abs=1e-5)
            assert one["label"] == LABELS[probabilities.index(max(probabilities))] and one["num_classes"] == 3
        count = sum(len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]) for text in TEXTS)
        assert told["usage"].pop("prompt_tokens_details") is None
        assert told["usage"] == {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
    alone = (await ask(ann, model="kinds", input=TEXTS[1])).json()["data"]
    assert alone[0]["probs"] == pytest.approx(expected(folder, folders["kinds"])[1], abs=1e-5)


async def test_what_cannot_be_classified_is_refused_by_its_field(
    service: Service, ann: httpx.AsyncClient, bob: httpx.AsyncClient, folder: Path
) -> None:
    publish(service, folder, "kinds", GRAFTS["kinds"])
    service.publish("ann", "ia3", "poems")
    long = "graft " * SETTINGS.max_context
    for body, status, param in (
        ({"model": "poems", "input": "x"}, 400, "model"),
        ({"model": "tiny", "input": "x"}, 400, "model"),
        ({"model": "nobody", "input": "x"}, 404, "model"),
        ({"model": "kinds", "input": []}, 400, "input"),
        ({"model": "kinds", "input": [3]}, 400, None),
        ({"model": "kinds", "input": ["x", ""]}, 400, "input.1"),
        ({"model": "kinds", "input": ["x", long]}, 400, "input.1"),
        ({"model": "kinds", "input": "x", "top_k": 3}, 400, "top_k"),
        ({"model": "kinds"}, 400, "input"),
    ):
        error = refusal(await ask(ann, **body), status)
        assert param is None or error["param"] == param, error
    assert refusal(await ask(bob, model="kinds", input="x"), 404)["code"] == "model_not_found", "it is ann's"
    chat = {"model": "kinds", "messages": [{"role": "user", "content": "Hi"}]}
    error = refusal(await ann.post("/chat/completions", json=chat), 400)
    assert error["param"] == "model" and "it classifies texts and writes none" in error["message"]

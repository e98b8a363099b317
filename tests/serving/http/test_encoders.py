"""A service with an encoder among its backbones: it takes jobs that classify texts, and writes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch

from polygraft.cluster.model import Backbone as Record
from polygraft.cluster.settings import load
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.checked import BackboneError
from polygraft.launch import default_backbone
from polygraft.serving.candidate import candidate
from polygraft.serving.http.app import create_app
from tests.serving.http.apis import OWN, knowing, known, record_of
from tests.serving.http.conftest import LABELLED, Service, jsonl, refusal, upload
from tests.serving.http.test_jobs import body, supervised
from tests.tiny import tiny_model

pytestmark = pytest.mark.anyio
CLASSIFICATION = {"type": "classification", "classification": {"hyperparameters": {"peft": "lora(r=4)"}}}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_model(tmp_path_factory.mktemp("roberta"), "roberta"), torch.float32)


@pytest.fixture
async def client(service: Service, roberta: Backbone) -> AsyncIterator[httpx.AsyncClient]:
    """Of a service whose backbone is the encoder."""
    record: Record = record_of(OWN, roberta)
    own = service.backbone
    service.api = knowing(service.api, known(record, roberta, own.gateway, own.adoption))
    service.transport = httpx.ASGITransport(create_app(service.api), raise_app_exceptions=False)
    async with service.as_("ann") as client:
        yield client


async def test_it_takes_jobs_that_classify_texts(client: httpx.AsyncClient, roberta: Backbone) -> None:
    asked = body(await upload(client, jsonl(*LABELLED)), method=CLASSIFICATION)
    made = await client.post("/fine_tuning/jobs", json=asked)
    assert made.status_code == 200, made.text
    hidden, lora = roberta.shape.hidden, BoundGraft(parse("lora(r=4)"), roberta.shape).parameters
    assert made.json()["parameters"] == lora + hidden * (hidden + 1) + 2 * (hidden + 1)


async def test_it_takes_no_others_and_writes_nothing(client: httpx.AsyncClient) -> None:
    error = refusal(await client.post("/fine_tuning/jobs", json=body(await upload(client), method=supervised())), 400)
    assert error["param"] == "method" and "roberta is an encoder" in error["message"]
    asked = {"model": OWN, "messages": [{"role": "user", "content": "Hi"}]}
    error = refusal(await client.post("/chat/completions", json=asked), 400)
    assert error["param"] == "model" and "classifies texts and writes none" in error["message"]


def test_it_may_be_added_but_is_never_the_services_own(roberta: Backbone, tmp_path: Path) -> None:
    assert not candidate(str(roberta.folder), tmp_path, None).decodes
    with pytest.raises(BackboneError, match="t5 is an encoder and a decoder"):
        candidate(str(tiny_model(tmp_path / "t5", "t5")), tmp_path, None)
    settings = load(home=tmp_path, backbone=str(roberta.folder))
    with pytest.raises(BackboneError, match="is an encoder; the service's own is to answer"):
        default_backbone.put_default(settings, tmp_path, ())

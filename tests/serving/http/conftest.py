"""The HTTP API over the memory store and an engine in this process, as two tenants see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from polygraft.cluster.api_keys import create_key
from polygraft.cluster.model import Alias, Graft, GraftId, Limits, ReplicaId, TenantId
from polygraft.cluster.settings import LimitSettings, ServeSettings
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.engine import Engine
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.http.context import Api
from polygraft.serving.http.known import KnownBackbone
from polygraft.serving.local import LocalLink
from tests.serving.http.apis import tiny_api
from tests.serving.naive import random_tensors
from tests.tiny import tiny_llama

SETTINGS = ServeSettings(max_streams=4, max_queued=2, max_context=160, kv_bytes=4 << 20, max_rows=64)
LIMITS = LimitSettings(upload_bytes=20_000, line_bytes=2_000, graft_bytes=2_000_000, jobs_per_tenant=4, body_s=0.6)
PACK_BYTES = 64 << 20
EXAMPLE = {"messages": [{"role": "user", "content": "What is a graft?"}, {"role": "assistant", "content": "A shoot."}]}


@dataclass
class Service:
    """What a test talks to and looks into; `as_` gives a client with a tenant's key."""

    api: Api
    engine: Engine
    transport: httpx.ASGITransport
    keys: dict[str, str]
    now: list[float] = field(default_factory=lambda: [1_000.0])

    def as_(self, tenant: str | None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"} if tenant else {}
        return httpx.AsyncClient(transport=self.transport, base_url="http://test/v1", headers=headers)

    @property
    def backbone(self) -> KnownBackbone:
        """The one that requests name as "tiny"."""
        default = self.api.backbones.default
        assert default is not None
        return default

    def publish(self, tenant: str, text: str, name: str, version: int = 1, *, backbone: str | None = None) -> Graft:
        """A graft with random tensors, as a finished job would leave it."""
        bound = BoundGraft(parse(text), self.backbone.shape)
        values = random_tensors(bound, version)
        of = backbone or self.backbone.fingerprint
        id = GraftId(native.save(self.api.folders.grafts, bound, values, backbone=of))
        return self.record(tenant, id, name, version, bound=bound, backbone=of)

    def record(
        self, tenant: str, id: GraftId, name: str, version: int = 1, *, bound: BoundGraft, backbone: str
    ) -> Graft:
        """The graft, whose files are there, under a name that means this version now."""
        graft = Graft(
            tenant=TenantId(tenant),
            name=name,
            version=version,
            id=id,
            method=bound.spec.method,
            backbone_fingerprint=backbone,
            parameters=1,
            bytes=1,
            context_length=bound.context_length,
            created_at=500.0,
        )
        alias = Alias(tenant=TenantId(tenant), name=name, version=version, latest=version)
        self.api.store.commit(
            [
                Write(keys.graft(graft.tenant, name, version), graft, 0),
                Write(keys.alias(graft.tenant, name), alias, None),
            ]
        )
        return graft


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32)


@pytest.fixture
def engine(backbone: Backbone, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(backbone, SETTINGS, replica=ReplicaId("r0"), data=tmp_path)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def adoption(folder: Path) -> Iterator[Adoption]:
    """One reader process for all tests; it starts with the first graft."""
    plan = ReaderPlan(backbone_folder=folder, quantise=None, memory_bytes=1 << 30, seconds=60.0)
    found = Adoption(plan)
    yield found
    asyncio.run(found.close())


@pytest.fixture
async def service(
    engine: Engine, backbone: Backbone, folder: Path, adoption: Adoption, tmp_path: Path
) -> AsyncIterator[Service]:
    store = MemoryStore()
    now = [1_000.0]
    gateway = Gateway({ReplicaId("r0"): LocalLink(engine)}, ingress="i0", settings=SETTINGS, ready_s=1.0)
    api = replace(
        tiny_api(store, gateway, backbone, tmp_path, adoption, max_context=SETTINGS.max_context),
        graft_roots=(tmp_path / "root",),
        limits=LIMITS,
        pack=lambda _: Limits(pack_bytes=PACK_BYTES),
        clock=lambda: now[0],
    )
    texts = {tenant: create_key(store, tenant=TenantId(tenant), name="test", at=0.0)[1] for tenant in ("ann", "bob")}
    transport = httpx.ASGITransport(create_app(api), raise_app_exceptions=False)
    service = Service(api, engine, transport, texts, now)
    await api.backbones.started(service.backbone)
    yield service
    await gateway.close()


@pytest.fixture
async def ann(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.as_("ann") as client:
        yield client


@pytest.fixture
async def bob(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.as_("bob") as client:
        yield client


def jsonl(*examples: object) -> bytes:
    return "".join(json.dumps(example) + "\n" for example in examples or [EXAMPLE] * 3).encode()


CHOICES = {"prompt": "What gives the fruit?", "choices": ["The stock.", "The graft."], "answer": 1}


LABELLED = [{"sentence": "a sweet fruit", "label": "sweet"}, {"sentence": "a sour one", "label": "sour"}]


async def upload(client: httpx.AsyncClient, content: bytes | None = None, *, name: str = "train.jsonl") -> str:
    files = {"file": (name, jsonl() if content is None else content)}
    answer = await client.post("/files", files=files, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def refusal(answer: httpx.Response, status: int) -> dict[str, str]:
    """The error object of an answer that must have `status`."""
    assert answer.status_code == status, answer.text
    error: dict[str, str] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def usage(prompt: int, answer: int, cached: int = 0) -> dict[str, Any]:
    """What an answer says of its tokens."""
    whole = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {**whole, "prompt_tokens_details": {"cached_tokens": cached}}


def counts(answer: dict[str, Any]) -> dict[str, int]:
    """How many tokens prompt and answer have, whatever was computed before."""
    return {name: count for name, count in answer["usage"].items() if name != "prompt_tokens_details"}

"""Two backbones of different families in one service: added, asked, trained on and removed over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch

from polygraft.cluster.api_keys import create_key
from polygraft.cluster.backbones import add_backbone, advance_backbone
from polygraft.cluster.events import BackboneAsked, BackboneRemoved
from polygraft.cluster.model import START, Backbone, GraftId, Limits, ReplicaId, TenantId
from polygraft.cluster.policy.capacity import DoesNotFit
from polygraft.cluster.store.base import WriteRefused
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime import backbone as runtime
from polygraft.grafts.text.message import Message
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.engine import Engine
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.http.known import Backbones, KnownBackbone
from polygraft.serving.local import LocalLink
from tests.serving.http.apis import OWN, known
from tests.serving.http.conftest import EXAMPLE, SETTINGS, Service, jsonl, refusal, upload
from tests.serving.naive import Solo, random_tensors
from tests.tiny import tiny_model

pytestmark = pytest.mark.anyio
ASK = "What is a graft?"
TOKENS = 12
OTHER = {"name": "other", "dtype": "fp32"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> runtime.Backbone:
    return runtime.Backbone.load(tiny_model(tmp_path_factory.mktemp("other"), "qwen3", seed=3), torch.float32)


@dataclass
class Shared:
    """The service of `conftest.py`, which serves whatever of `other` is added to it, and its operator."""

    service: Service
    other: runtime.Backbone
    operator: httpx.AsyncClient
    ann: httpx.AsyncClient

    @property
    def backbones(self) -> Backbones:
        return self.service.api.backbones

    async def add(self, **changes: object) -> httpx.Response:
        return await self.operator.post("/backbones", json={**OTHER, "path": str(self.other.folder), **changes})

    def graft_on_other(self, text: str, name: str, seed: int) -> dict[str, torch.Tensor]:
        bound = BoundGraft(parse(text), self.other.shape)
        values = random_tensors(bound, seed)
        of = self.other.fingerprint
        id = native.save(self.service.api.folders.grafts, bound, values, backbone=of)
        self.service.record("ann", GraftId(id), name, bound=bound, backbone=of)
        return values

    async def says(self, model: str) -> str:
        asked = {"messages": [{"role": "user", "content": ASK}], "max_tokens": TOKENS, "temperature": 0}
        answer = await self.ann.post("/chat/completions", json={"model": model, **asked})
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text


@pytest.fixture
async def shared(service: Service, other: runtime.Backbone, tmp_path: Path) -> AsyncIterator[Shared]:
    store = service.api.store
    engine = Engine(other, SETTINGS, replica=ReplicaId("r1"), data=tmp_path)
    engine.start()
    plan = ReaderPlan(backbone_folder=other.folder, quantise=None, memory_bytes=1 << 30, seconds=60.0)

    def opened(record: Backbone) -> KnownBackbone:
        if record.name == OWN:
            links = {ReplicaId("r0"): LocalLink(service.engine)}
            return known(
                record,
                service.engine._backbone,
                Gateway(links, ingress="i1", settings=SETTINGS),
                Adoption(replace(plan, backbone_folder=service.engine._backbone.folder)),
                max_context=SETTINGS.max_context,
            )
        if record.folder != str(other.folder):
            raise FileNotFoundError(record.folder)
        gateway = Gateway({ReplicaId("r1"): LocalLink(engine)}, ingress="i0", settings=SETTINGS)
        return known(record, other, gateway, Adoption(plan), max_context=SETTINGS.max_context)

    backbones = Backbones(store, opened, default=OWN, unload_s=600.0, clock=service.api.clock)
    await backbones.start()
    service.api = replace(service.api, backbones=backbones, pack=lambda _: Limits())
    service.transport = httpx.ASGITransport(create_app(service.api), raise_app_exceptions=False)
    service.keys["local"] = create_key(store, tenant=TenantId("local"), name="test", at=0.0)[1]
    async with service.as_("local") as operator, service.as_("ann") as ann:
        yield Shared(service, other, operator, ann)
    await backbones.close()
    engine.stop()


async def test_mixed_requests_say_what_each_model_says_alone(shared: Shared) -> None:
    assert (await shared.add()).status_code == 200
    service, own = shared.service, shared.service.backbone
    service.publish("ann", "lora(r=4)", "poems", 1)
    songs = shared.graft_on_other("lora(r=4)", "songs", 2)
    poems = BoundGraft(parse("lora(r=4)"), own.shape)
    alone = {
        OWN: Solo(service.engine._backbone.folder, own.shape, None, {}),
        "poems": Solo(service.engine._backbone.folder, own.shape, poems, random_tensors(poems, 1)),
        "other": Solo(shared.other.folder, shared.other.shape, None, {}),
        "songs": Solo(
            shared.other.folder, shared.other.shape, BoundGraft(parse("lora(r=4)"), shared.other.shape), songs
        ),
    }
    tokeniser = own.tokeniser
    prompt = tokeniser.encode_chat([Message("user", ASK)], add_generation_prompt=True)
    expected = []
    for solo in alone.values():
        said = solo.greedy(prompt, TOKENS)
        end = next((i for i, id in enumerate(said) if id in tokeniser.eos_ids), TOKENS)
        expected.append(tokeniser.decode([*prompt, *said[:end]]).removeprefix(tokeniser.decode(prompt)))
    assert await asyncio.gather(*map(shared.says, alone)) == expected
    assert len(set(expected)) == 4
    listed = (await shared.ann.get("/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        (OWN, None),
        ("other", None),
        ("poems", OWN),
        ("poems@1", OWN),
        ("songs", "other"),
        ("songs@1", "other"),
    ]


async def test_a_backbone_is_listed_as_what_it_is(shared: Shared) -> None:
    added = (await shared.add()).json()
    assert added == {
        "id": "other",
        "object": "backbone",
        "default": False,
        "path": str(shared.other.folder),
        "dtype": "fp32",
        "quantise": None,
        "fingerprint": shared.other.fingerprint,
        "context_length": 512,
        "state": "unloaded",
        "added_at": 1000,
    }
    assert (await shared.add()).json() == added, "the same again"
    own, seen = (await shared.ann.get("/backbones")).json()["data"]
    assert (own["id"], own["default"], own["path"]) == (OWN, True, None)
    assert seen == {**added, "path": None}


async def test_a_job_trains_on_the_backbone_that_it_names_and_keeps_it_there(shared: Shared) -> None:
    await shared.add()
    asked = {"model": "other", "training_file": await upload(shared.ann, jsonl(EXAMPLE)), "suffix": "mine"}
    job = (await shared.ann.post("/fine_tuning/jobs", json=asked)).json()
    own_job = (await shared.ann.post("/fine_tuning/jobs", json={**asked, "model": OWN})).json()
    assert job["model"] == "other" and job["parameters"] != own_job["parameters"]
    refused = refusal(await shared.operator.delete("/backbones/other"), 409)
    assert refused["code"] == "backbone_in_use" and "1 unfinished jobs" in refused["message"]
    named = refusal(await shared.ann.post("/fine_tuning/jobs", json={**asked, "suffix": "other"}), 400)
    assert named["param"] == "suffix"
    wrong = refusal(await shared.ann.post("/fine_tuning/jobs", json={**asked, "model": "none"}), 404)
    assert wrong["param"] == "model" and "it has tiny, other" in wrong["message"]


async def test_a_graft_stays_on_its_backbone(shared: Shared, tmp_path: Path) -> None:
    await shared.add()
    shared.service.publish("ann", "ia3", "poems", 1)
    shared.graft_on_other("ia3", "songs", 2)
    file = await upload(shared.ann, jsonl(EXAMPLE))
    hyperparameters = {"hyperparameters": {"peft": "lora + from(of=songs)"}}
    asked = {"model": OWN, "training_file": file, "method": {"type": "supervised", "supervised": hyperparameters}}
    refused = refusal(await shared.ann.post("/fine_tuning/jobs", json=asked), 400)
    assert "'songs' has grown on another backbone than tiny" in refused["message"]
    archive = (await shared.ann.get("/grafts/songs/export")).content

    async def imported(backbone: str) -> httpx.Response:
        fields = {"name": "again", "backbone": backbone}
        return await shared.ann.post("/grafts", files={"file": ("g.tar", archive)}, data=fields)

    assert "grown on backbone" in refusal(await imported(OWN), 400)["message"]
    assert refusal(await imported("none"), 404)["param"] == "backbone"
    assert (await imported("other")).json()["backbone"] == "other"
    assert (await shared.ann.get("/grafts/poems")).json()["backbone"] == OWN


async def test_one_that_was_removed_is_nobody_s_and_its_grafts_come_back_with_it(shared: Shared) -> None:
    await shared.add()
    shared.graft_on_other("ia3", "songs", 2)
    before = await shared.says("songs")
    assert (await shared.operator.delete("/backbones/other")).json()["deleted"]
    unknown = refusal(await shared.ann.post("/chat/completions", json=chat("other")), 404)
    assert "backbones of this service: tiny" in unknown["message"]
    homeless = refusal(await shared.ann.post("/chat/completions", json=chat("songs")), 400)
    assert "trained on another backbone than tiny" in homeless["message"]
    assert (await shared.ann.get("/grafts/songs")).json()["backbone"] is None
    refusal(await shared.operator.delete("/backbones/other"), 404)
    await shared.add(name="again")
    assert await shared.says("songs") == before


@pytest.mark.parametrize(
    ("changes", "status", "param", "said"),
    [
        ({"name": "a/b"}, 400, "name", "'a/b'"),
        ({"path": "/nowhere"}, 400, "path", "/nowhere"),
        ({"path": "smollm3"}, 400, "path", "neither"),
        ({"path": "a\0b"}, 400, "path", "neither"),
        ({"path": "a" * 4_000}, 400, "path", "neither"),  # longer than a name may be
        ({"path": "~nobodys/x"}, 400, "path", "neither"),
        ({"dtype": "fp8"}, 400, "dtype", "fp8"),
        ({"quantise": "int3"}, 400, "quantise", "int3"),
        ({"name": OWN}, 409, "name", "another backbone"),
    ],
)
async def test_what_cannot_be_added_is_refused_by_its_field(
    shared: Shared, changes: dict[str, str], status: int, param: str, said: str
) -> None:
    error = refusal(await shared.add(**changes), status)
    assert error["param"] == param and said in error["message"]


async def test_one_that_no_device_has_room_for_is_refused_with_the_bytes(shared: Shared) -> None:
    def refuse(record: Backbone) -> Backbone:
        raise DoesNotFit(f"a replica needs at least 40,924,505,702 bytes for {record.name}")

    shared.service.api = replace(shared.service.api, sized=refuse)
    shared.service.transport = httpx.ASGITransport(create_app(shared.service.api), raise_app_exceptions=False)
    async with shared.service.as_("local") as operator:
        answer = await operator.post("/backbones", json={**OTHER, "path": str(shared.other.folder)})
    error = refusal(answer, 400)
    assert error["code"] == "no_device_fits" and "40,924,505,702 bytes for other" in error["message"]


async def test_a_job_is_measured_by_the_packs_of_the_backbone_that_it_names(shared: Shared) -> None:
    assert (await shared.add()).status_code == 200
    limits = {OWN: Limits(), "other": Limits(pack_bytes=1000)}
    shared.service.api = replace(shared.service.api, pack=lambda record: limits[record.name])
    shared.service.transport = httpx.ASGITransport(create_app(shared.service.api), raise_app_exceptions=False)
    async with shared.service.as_("ann") as ann:
        file = await upload(ann)
        fits = await ann.post("/fine_tuning/jobs", json={"model": OWN, "training_file": file})
        refused = refusal(await ann.post("/fine_tuning/jobs", json={"model": "other", "training_file": file}), 400)
    assert fits.status_code == 200 and "a pack has 1,000" in refused["message"]


async def test_a_model_that_is_there_keeps_its_one_name(shared: Shared) -> None:
    await shared.add()
    assert "is the model of the backbone other" in refusal(await shared.add(name="again"), 409)["message"]


async def test_only_the_operator_changes_what_all_share(shared: Shared) -> None:
    body = {**OTHER, "path": str(shared.other.folder)}
    assert refusal(await shared.ann.post("/backbones", json=body), 403)["code"] == "not_the_operator"
    assert refusal(await shared.ann.delete(f"/backbones/{OWN}"), 403)["type"] == "permission_error"
    assert "the service's own" in refusal(await shared.operator.delete(f"/backbones/{OWN}"), 409)["message"]


async def test_whoever_names_a_backbone_that_is_not_there_is_told_those_that_are(shared: Shared) -> None:
    await shared.add()
    file = await upload(shared.ann, jsonl(EXAMPLE))
    files = {"training_file": file, "validation_file": file}
    asked = {
        "/chat/completions": chat("none"),
        "/completions": {"model": "none", "prompt": ASK},
        "http://test/classify": {"model": "none", "input": ASK},
        "http://test/tokenize": {"model": "none", "prompt": ASK},
        "http://test/detokenize": {"model": "none", "tokens": [5]},
        "/fine_tuning/jobs": {"model": "none", "training_file": file},
        "/searches": {"model": "none", "name": "find", **files},
    }
    answers = [await shared.ann.post(path, json=body) for path, body in asked.items()]
    form = {"name": "again", "backbone": "none"}
    answers.append(await shared.ann.post("/grafts", files={"file": ("g.tar", b"x")}, data=form))
    answers.append(await shared.operator.delete("/backbones/none"))
    for answer in answers:
        assert f"{OWN}, other" in refusal(answer, 404)["message"], answer.request.url


async def test_one_that_is_generating_stays_and_is_kept_loaded(shared: Shared) -> None:
    await shared.add()
    found = shared.backbones.named("other")
    assert found is not None
    async with shared.backbones.answering(found):
        assert "generating" in refusal(await shared.operator.delete("/backbones/other"), 409)["message"]
        shared.service.now[0] += 10_000.0
        await shared.backbones._follow_once()
    shared.backbones.look()
    assert [one.record.asked_at for one in shared.backbones] == [1.0, 11_000.0]
    assert (await shared.operator.delete("/backbones/other")).status_code == 200


async def test_the_store_is_told_now_and_then_that_a_backbone_is_asked(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shared.add()

    def asked() -> list[float]:
        said = [one.event for one in shared.service.api.store.events(START)]
        return [one.at for one in said if isinstance(one, BackboneAsked) and one.backbone == "other"]

    for _ in range(3):
        await shared.says("other")
        shared.backbones.look()
    shared.service.now[0] += 61.0
    await shared.says("other")
    assert asked() == [1_000.0, 1_061.0]

    def refuse(*_: object, **__: object) -> None:
        raise WriteRefused("no room")

    shared.service.now[0] += 61.0
    monkeypatch.setattr(shared.service.api.store, "commit", refuse)
    await shared.says("other")


async def test_another_ingress_s_changes_are_followed(shared: Shared) -> None:
    store = shared.service.api.store
    await shared.add()
    advance_backbone(store, BackboneRemoved(backbone="other", at=1.0))
    shared.backbones.look()
    assert shared.backbones.names == (OWN,)
    record = replace(shared.service.backbone.record, name="broken", folder="/gone", fingerprint="f")
    add_backbone(store, record)
    assert shared.backbones.named("broken") is None and shared.backbones.names == (OWN,)
    listed = (await shared.ann.get("/backbones")).json()["data"]
    assert [(one["id"], one["state"]) for one in listed] == [(OWN, "loaded"), ("broken", "unloaded")]


def chat(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": ASK}], "max_tokens": 1}


async def test_a_backbone_that_a_search_runs_on_stays(shared: Shared) -> None:
    await shared.add()
    files = {name: await upload(shared.ann, jsonl(EXAMPLE)) for name in ("training_file", "validation_file")}
    space = {"kind": "autopeft", "groups": 1, "largest": 4, "longest": 4}
    asked = {"name": "find", "model": "other", "space": space, **files}
    assert (await shared.ann.post("/searches", json=asked)).status_code == 200
    refused = refusal(await shared.operator.delete("/backbones/other"), 409)
    assert refused["code"] == "backbone_in_use" and "1 running searches" in refused["message"]

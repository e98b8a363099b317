"""Every refusal that the OpenAPI document names is one that the operation can answer, in the documented shape; and a
fault of the service tells its cause to the log alone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest

from polygraft.cluster.advance import advance_job
from polygraft.cluster.api_keys import OPERATOR, create_key
from polygraft.cluster.events import JobCancelled
from polygraft.cluster.model import JobId, StudyId
from polygraft.cluster.states import SearchState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, Write
from polygraft.serving.http.auth import OPEN_PATHS
from polygraft.serving.http.schemas import ErrorAnswer
from tests.serving.http.conftest import LIMITS, Service, upload
from tests.serving.http.test_bodies import unending

pytestmark = pytest.mark.anyio
Documented = set[tuple[str, str, int]]
FORMS = ("/v1/files", "/v1/grafts")
READING = (400, 408, 413, 429)
CHAT = {"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}
SEARCH = {"name": "s", "training_file": "F", "validation_file": "F", "trials": 2}
# What is asked of a service with a file F in use, a job J that waits, a job K that is cancelled, and poems@1 and @2 of
# which the name means the second; of backbones by the operator, unless he is missed, and B is the folder of one.
REFUSED: list[tuple[str, str, int, str, dict[str, Any]]] = [
    ("get", "/v1/files", 400, "/v1/files?limit=0", {}),
    ("get", "/v1/files/{file}", 404, "/v1/files/none", {}),
    ("get", "/v1/files/{file}/content", 404, "/v1/files/none/content", {}),
    ("delete", "/v1/files/{file}", 404, "/v1/files/none", {}),
    ("delete", "/v1/files/{file}", 409, "/v1/files/F", {}),
    ("get", "/v1/fine_tuning/jobs", 400, "/v1/fine_tuning/jobs?after=none", {}),
    ("post", "/v1/fine_tuning/jobs", 404, "/v1/fine_tuning/jobs", {"json": {"model": "x", "training_file": "F"}}),
    ("post", "/v1/fine_tuning/jobs", 409, "/v1/fine_tuning/jobs", {"json": {}, "headers": {"Idempotency-Key": "k"}}),
    (
        "post",
        "/v1/fine_tuning/dry_runs",
        404,
        "/v1/fine_tuning/dry_runs",
        {"json": {"model": "x", "training_file": "F"}},
    ),
    ("get", "/v1/fine_tuning/jobs/{job}", 404, "/v1/fine_tuning/jobs/none", {}),
    ("post", "/v1/fine_tuning/jobs/{job}/cancel", 400, "/v1/fine_tuning/jobs/K/cancel", {}),
    ("post", "/v1/fine_tuning/jobs/{job}/cancel", 404, "/v1/fine_tuning/jobs/none/cancel", {}),
    ("post", "/v1/fine_tuning/jobs/{job}/renew", 404, "/v1/fine_tuning/jobs/none/renew", {"json": {"lease_s": 9}}),
    ("get", "/v1/fine_tuning/jobs/{job}/events", 400, "/v1/fine_tuning/jobs/J/events?limit=0", {}),
    ("get", "/v1/fine_tuning/jobs/{job}/events", 404, "/v1/fine_tuning/jobs/none/events", {}),
    ("get", "/v1/searches", 400, "/v1/searches?limit=0", {}),
    ("post", "/v1/searches", 404, "/v1/searches", {"json": {**SEARCH, "training_file": "none"}}),
    ("post", "/v1/searches", 409, "/v1/searches", {"json": {}, "headers": {"Idempotency-Key": "k"}}),
    ("get", "/v1/searches/{search}", 404, "/v1/searches/none", {}),
    ("post", "/v1/searches/{search}/cancel", 400, "/v1/searches/S/cancel", {}),
    ("post", "/v1/searches/{search}/cancel", 404, "/v1/searches/none/cancel", {}),
    ("get", "/v1/searches/{search}/trials", 400, "/v1/searches/S/trials?limit=0", {}),
    ("get", "/v1/searches/{search}/trials", 404, "/v1/searches/none/trials", {}),
    ("get", "/v1/searches/{search}/front", 404, "/v1/searches/none/front", {}),
    ("get", "/v1/searches/{search}/events", 400, "/v1/searches/S/events?limit=0", {}),
    ("get", "/v1/searches/{search}/events", 404, "/v1/searches/none/events", {}),
    ("get", "/v1/models/{model}", 404, "/v1/models/none", {}),
    ("post", "/v1/chat/completions", 404, "/v1/chat/completions", {"json": CHAT}),
    ("post", "/v1/completions", 404, "/v1/completions", {"json": {"model": "nobody", "prompt": "Hi"}}),
    ("post", "/classify", 404, "/classify", {"json": {"model": "nobody", "input": "Hi"}}),
    ("post", "/tokenize", 404, "/tokenize", {"json": {"model": "nobody", "prompt": "Hi"}}),
    ("post", "/detokenize", 404, "/detokenize", {"json": {"model": "nobody", "tokens": [5]}}),
    ("post", "/v1/unload_lora_adapter", 404, "/v1/unload_lora_adapter", {"json": {"lora_name": "none"}}),
    ("post", "/v1/unload_lora_adapter", 409, "/v1/unload_lora_adapter", {"json": {"lora_name": "trained"}}),
    ("post", "/v1/backbones", 403, "/v1/backbones", {"json": {"name": "again", "path": "B"}}),
    ("post", "/v1/backbones", 409, "/v1/backbones", {"json": {"name": "again", "path": "B"}}),
    ("delete", "/v1/backbones/{backbone}", 403, "/v1/backbones/tiny", {}),
    ("delete", "/v1/backbones/{backbone}", 404, "/v1/backbones/none", {}),
    ("delete", "/v1/backbones/{backbone}", 409, "/v1/backbones/tiny", {}),
    ("post", "/v1/grafts", 404, "/v1/grafts", {"files": {"file": b""}, "data": {"name": "a", "backbone": "none"}}),
    (
        "post",
        "/v1/grafts/import",
        404,
        "/v1/grafts/import",
        {"json": {"name": "a", "path": "/", "backbone": "none"}},
    ),
    ("get", "/v1/grafts", 400, "/v1/grafts?limit=0", {}),
    ("get", "/v1/grafts/{graft}", 404, "/v1/grafts/none", {}),
    ("delete", "/v1/grafts/{graft}", 400, "/v1/grafts/poems", {}),
    ("delete", "/v1/grafts/{graft}", 404, "/v1/grafts/poems@3", {}),
    ("delete", "/v1/grafts/{graft}", 409, "/v1/grafts/poems@2", {}),
    ("get", "/v1/grafts/{graft}/export", 400, "/v1/grafts/poems/export?format=x", {}),
    ("get", "/v1/grafts/{graft}/export", 404, "/v1/grafts/none/export", {}),
    ("post", "/v1/grafts/{graft}/promote", 400, "/v1/grafts/poems/promote", {}),
    ("post", "/v1/grafts/{graft}/promote", 404, "/v1/grafts/none/promote", {}),
    ("post", "/v1/grafts/{graft}/rollback", 400, "/v1/grafts/poems@1/rollback", {}),
    ("post", "/v1/grafts/{graft}/rollback", 404, "/v1/grafts/none/rollback", {}),
    ("post", "/v1/grafts/{graft}/rollback", 409, "/v1/grafts/alone/rollback", {}),
]


async def document(service: Service, client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("http://test/openapi.json")).json()
    return found


def refusals(document: dict[str, Any]) -> Documented:
    return {
        (method, path, int(status))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
        if status != "200"
    }


async def test_every_reference_leads_to_a_schema_of_the_document(service: Service, ann: httpx.AsyncClient) -> None:
    whole = await document(service, ann)
    text = json.dumps(whole)
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert len(referred) > 20 and referred <= whole["components"]["schemas"].keys()
    assert set(re.findall(r'"\$ref": "([^"]+)"', text)) == {f"#/components/schemas/{name}" for name in referred}


async def test_every_documented_refusal_is_answered_and_no_other(service: Service, ann: httpx.AsyncClient) -> None:
    for name, version in (("poems", 1), ("poems", 2), ("alone", 1)):
        service.publish("ann", "ia3", name, version)
    trained = service.publish("ann", "ia3", "trained")
    key = keys.graft(trained.tenant, "trained", 1)
    service.api.store.commit([Write(key, replace(trained, job=JobId("ftjob-1")), None)])
    file = await upload(ann)
    body = {"model": "tiny", "training_file": file}
    keyed = {"Idempotency-Key": "k"}
    first = (await ann.post("/fine_tuning/jobs", json=body, headers=keyed)).json()["id"]
    other = (await ann.post("/fine_tuning/jobs", json=body)).json()["id"]
    advance_job(service.api.store, JobCancelled(job=other, at=1.0))
    asked = {**SEARCH, "training_file": file, "validation_file": file}
    search = (await ann.post("/searches", json=asked, headers=keyed)).json()["id"]
    begun = service.api.store.get(keys.search(StudyId(search)))
    assert begun is not None
    over = replace(begun.value, state=SearchState.SUCCEEDED)
    service.api.store.commit([Write(begun.key, over, begun.version)])
    named = {"F": file, "J": first, "K": other, "B": service.backbone.record.folder, "S": search}
    service.keys["local"] = create_key(service.api.store, tenant=OPERATOR, name="test", at=0.0)[1]
    operator = service.as_("local")
    seen: Documented = set()
    for method, template, status, path, sent in REFUSED:
        url = "/".join(named.get(part, part) for part in path.split("/"))
        if "json" in sent:
            sent = {**sent, "json": {field: named.get(str(value), value) for field, value in sent["json"].items()}}
        asker = operator if "backbones" in path and status != 403 else ann
        answer = await asker.request(method, f"http://test{url}", **sent)
        assert answer.status_code == status, (url, answer.text)
        ErrorAnswer.model_validate(answer.json())
        seen.add((method, template, status))
    async with service.as_("bob") as bob:  # who is no reader of metrics
        for path in ("/metrics", "/v1/cluster"):
            assert (await bob.get(f"http://test{path}")).status_code == 403
            seen.add(("get", path, 403))
    wanted = refusals(await document(service, ann))
    bodied = {path: path.replace("{job}", first) for _, path, status in wanted if status == 413}
    for path, url in bodied.items():
        raw = await ann.post(f"http://test{url}", content=b"{")
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        large = await ann.post(f"http://test{url}", content=bytes(5 << 20), headers=form)
        assert (raw.status_code, large.status_code) == (400, 413), path
    rest, most = sorted(bodied.keys() - set(FORMS)), LIMITS.bodies_per_tenant
    others = [rest[first : first + most] for first in range(0, len(rest), most)]  # no more than there are places
    for group in (FORMS, *others):  # forms look at their bodies later
        slow = [path for _ in range(2 * LIMITS.bodies_per_tenant) for path in sorted(group)]
        told = await asyncio.gather(*(unending(service, "ann", bodied[path]) for path in slow))
        assert set(zip(slow, told, strict=True)) == {(path, status) for path in group for status in (408, 429)}
    seen |= {("post", path, status) for path in bodied for status in READING}
    # Whatever the operation: no key, a fault of the service, a store that is down.
    everywhere = {(method, path) for method, path, _ in wanted}
    for status in (401, 500, 503):
        seen |= {(method, path, status) for method, path in everywhere if path not in OPEN_PATHS or status != 401}
    assert seen == wanted


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_every_operation_says_that_the_caller_or_the_service_is_not_right(
    service: Service, ann: httpx.AsyncClient, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = {(method, path) for method, path, _ in refusals(await document(service, ann))}
    if status == 401:
        operations -= {("get", path) for path in OPEN_PATHS}
        ann.headers.pop("Authorization")
    elif status == 503:
        service.api.store.close()
    else:

        def broken(*_: object) -> None:
            raise RuntimeError("the secret of another tenant")

        for name in ("get", "ping"):
            monkeypatch.setattr(service.api.store, name, broken)
    for method, path in sorted(operations):
        answer = await ann.request(method, f"http://test{path}")
        assert answer.status_code == status, (method, path, answer.text)
        assert "secret" not in answer.text
        ErrorAnswer.model_validate(answer.json())


async def test_a_fault_tells_an_id_and_the_log_tells_why(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("bob's prompt")

    monkeypatch.setattr(service.api.store, "scan", broken)
    message = (await ann.get("/models")).json()["error"]["message"]
    reference = message.split()[-1]
    assert reference.startswith("err-") and "bob" not in message
    (record,) = [one for one in logged if one.levelno >= logging.ERROR and reference in one.getMessage()]
    assert "bob's prompt" in record.getMessage() and record.exc_info is not None


async def test_a_conflict_names_no_key_of_the_store(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await upload(ann)

    def faster(*_: object, **__: object) -> None:
        raise Conflict("alias/bob/secret-project", 1, 2)

    monkeypatch.setattr(service.api.store, "commit", faster)
    answer = await ann.delete(f"/files/{file}")
    assert answer.status_code == 409 and "secret" not in answer.text and "bob" not in answer.text


async def test_answers_are_as_the_document_says(service: Service, ann: httpx.AsyncClient) -> None:
    """Of the answers that Schemathesis rarely meets: good ones, with all their fields."""
    service.publish("ann", "ia3", "poems")
    file = await upload(ann)
    found = await document(service, ann)
    ask = {"model": "poems", "messages": CHAT["messages"], "max_tokens": 2}
    for method, template, path, body in (
        ("get", "/v1/grafts", "/grafts", None),
        ("get", "/v1/models", "/models", None),
        ("get", "/v1/backbones", "/backbones", None),
        ("get", "/v1/files/{file}", f"/files/{file}", None),
        ("post", "/v1/fine_tuning/jobs", "/fine_tuning/jobs", {"model": "tiny", "training_file": file}),
        ("get", "/v1/fine_tuning/jobs", "/fine_tuning/jobs", None),
        ("post", "/v1/chat/completions", "/chat/completions", ask),
        ("post", "/tokenize", "http://test/tokenize", {"prompt": "Hi", "return_token_strs": True}),
        ("post", "/detokenize", "http://test/detokenize", {"tokens": [5, 6]}),
        ("post", "/v1/completions", "/completions", {"model": "poems", "prompt": "Hi", "max_tokens": 2}),
    ):
        answer = await ann.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        schema = found["paths"][template][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": found["components"]})

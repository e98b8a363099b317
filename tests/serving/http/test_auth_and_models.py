"""Keys, tenants and the list of models."""

from __future__ import annotations

import httpx
import pytest

from polygraft.cluster.api_keys import list_keys, revoke_key
from polygraft.cluster.model import TenantId
from tests.serving.http.conftest import Service, refusal

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic pg-x", "Bearer pg-unknown", "Bearer no-prefix"]
)
async def test_without_a_good_key_everything_is_401_before_the_body_is_read(
    service: Service, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with httpx.AsyncClient(transport=service.transport, base_url="http://test/v1", headers=headers) as client:
        for answer in (
            await client.get("/models"),
            await client.post("/chat/completions", content=b"{not json"),
            await client.post("/files", content=b"x" * 100),
            await client.get("/nowhere"),
        ):
            assert refusal(answer, 401)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_revoked_key_is_401(service: Service, ann: httpx.AsyncClient) -> None:
    assert (await ann.get("/models")).status_code == 200
    revoke_key(service.api.store, list_keys(service.api.store, TenantId("ann"))[0].id, at=1.0)
    assert refusal(await ann.get("/models"), 401)["code"] == "invalid_api_key"


async def test_health_needs_no_key(service: Service) -> None:
    async with httpx.AsyncClient(transport=service.transport, base_url="http://test") as nobody:
        for path in ("/healthz", "/health"):
            for _ in range(100):
                answer = await nobody.get(path)
                if answer.status_code == 200:
                    break
            assert answer.json() == {"status": "ok"}


async def test_what_is_not_there_is_404_and_wrong_methods_405_in_openais_shape(ann: httpx.AsyncClient) -> None:
    refusal(await ann.get("/nowhere"), 404)
    refusal(await ann.put("/models"), 405)


async def test_models_are_the_backbone_and_the_tenants_own_grafts(service: Service, ann: httpx.AsyncClient) -> None:
    service.publish("ann", "ia3", "poems", 1)
    service.publish("ann", "ia3", "poems", 2)
    service.publish("bob", "ia3", "secrets", 1)
    listed = (await ann.get("/models")).json()
    assert listed["object"] == "list"
    assert [(m["id"], m["root"], m["parent"]) for m in listed["data"]] == [
        ("tiny", "tiny", None),
        ("poems@1", "poems@1", "tiny"),
        ("poems", "poems@2", "tiny"),
        ("poems@2", "poems@2", "tiny"),
    ]
    assert (await ann.get("/models/poems@1")).json() == listed["data"][1]
    assert (await ann.get("/models/tiny")).json() == listed["data"][0]
    for unknown in ("secrets", "secrets@1", "poems@3", "a/b"):
        assert refusal(await ann.get(f"/models/{unknown}"), 404)["param"] == "model"

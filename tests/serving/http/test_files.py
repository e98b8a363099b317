"""`/v1/files`: uploads that are whole, checked and private."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from polygraft.cluster.model import FileId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import StoreUnavailable, WriteRefused
from tests.serving.http.conftest import EXAMPLE, Service, jsonl, refusal, upload
from tests.small_disk import FILLER, small_disk

pytestmark = pytest.mark.anyio


def left_behind(service: Service) -> list[str]:
    return [str(path) for path in service.api.folders.files.rglob("*") if path.is_file()]


async def test_a_file_is_stored_listed_read_back_and_deleted(service: Service, ann: httpx.AsyncClient) -> None:
    content = jsonl(*[EXAMPLE] * 5)
    id = await upload(ann, content, name="my data.jsonl")
    made = (await ann.get(f"/files/{id}")).json()
    assert made == {
        "id": id,
        "object": "file",
        "bytes": len(content),
        "created_at": 1000,
        "filename": "my data.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
    assert (await ann.get(f"/files/{id}/content")).content == content
    record = service.api.store.get(keys.file(FileId(id)))
    assert record is not None and record.value.examples == 5 and record.value.digest == sha256(content).hexdigest()
    listed = (await ann.get("/files")).json()
    assert (listed["object"], listed["data"], listed["has_more"]) == ("list", [made], False)
    assert (await ann.delete(f"/files/{id}")).json() == {"id": id, "object": "file", "deleted": True}
    refusal(await ann.get(f"/files/{id}"), 404)
    assert left_behind(service) == []


async def test_lists_are_cut_into_pages_newest_first(service: Service, ann: httpx.AsyncClient) -> None:
    ids = []
    for _ in range(3):
        ids.append(await upload(ann))
        service.now[0] += 1
    first = (await ann.get("/files?limit=2")).json()
    assert [file["id"] for file in first["data"]] == ids[:0:-1] and first["has_more"]
    second = (await ann.get(f"/files?limit=2&after={first['last_id']}")).json()
    assert [file["id"] for file in second["data"]] == ids[:1] and not second["has_more"]
    assert [file["id"] for file in (await ann.get("/files?order=asc")).json()["data"]] == ids
    assert refusal(await ann.get("/files?after=file-none"), 400)["param"] == "after"
    assert refusal(await ann.get("/files?limit=0"), 400)["param"] == "limit"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (jsonl(EXAMPLE) + b"{not json\n", "line 2"),
        (jsonl(EXAMPLE, EXAMPLE, {"messages": [{"role": "king", "content": "x"}]}), "line 3"),
        (b"\xff\xfe\n", "line 1"),
        (jsonl({"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]}), "2000"),
    ],
)
async def test_a_bad_line_is_named_and_nothing_is_kept(
    service: Service, ann: httpx.AsyncClient, content: bytes, said: str
) -> None:
    answer = await ann.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
    error = refusal(answer, 400)
    assert error["param"] == "file" and said in error["message"]
    assert left_behind(service) == [] and (await ann.get("/files")).json()["data"] == []


async def test_an_oversize_upload_is_413_whether_announced_or_not(service: Service, ann: httpx.AsyncClient) -> None:
    large = b"x" * 200_000
    announced = await ann.post("/files", files={"file": ("a.jsonl", large)}, data={"purpose": "fine-tune"})
    assert "20000" in refusal(announced, 413)["message"]

    async def chunks() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield large[:1000]
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refusal(await ann.post("/files", content=chunks(), headers=headers), 413)
    assert left_behind(service) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "purpose"), ({"purpose": "batch"}, "purpose"), ({"purpose": "fine-tune", "colour": "red"}, "colour")],
)
async def test_form_fields_are_checked(
    service: Service, ann: httpx.AsyncClient, fields: dict[str, str], param: str
) -> None:
    answer = await ann.post("/files", files={"file": ("a.jsonl", jsonl())}, data=fields)
    assert refusal(answer, 400)["param"] == param
    assert left_behind(service) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"garbage", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"mess',
            "multipart/form-data; boundary=b",
        ),
    ],
)
async def test_a_body_that_is_no_form_with_a_file_is_400(
    service: Service, ann: httpx.AsyncClient, content: bytes, kind: str
) -> None:
    refusal(await ann.post("/files", content=content, headers={"Content-Type": kind}), 400)
    assert left_behind(service) == []


async def test_a_form_without_its_closing_boundary_is_400_and_nothing_is_kept(
    service: Service, ann: httpx.AsyncClient
) -> None:
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    whole = purpose + file + jsonl() + b"\r\n--b--\r\n"
    for cut in (whole[: -len("\r\n--b--\r\n")], whole[: -len("--\r\n")]):
        error = refusal(await ann.post("/files", content=cut, headers=headers), 400)
        assert error["param"] == "file" and "closing boundary" in error["message"]
    assert left_behind(service) == []
    for end in (whole, whole[: -len("\r\n")]):  # the last line may lack its end
        assert (await ann.post("/files", content=end, headers=headers)).status_code == 200


async def test_what_lies_outside_the_file_is_limited_too(service: Service, ann: httpx.AsyncClient) -> None:
    """In many short fields, or after the last boundary."""
    sent = 0

    async def chunks(first: bytes, again: bytes) -> AsyncIterator[bytes]:
        nonlocal sent
        sent = 0
        yield first
        for count in range(1000):
            sent = count
            yield again * (2000 // len(again))

    field = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for first, again in ((b"", field), (field[:-2] + b"\r\n--b--\r\n", b"\r\n")):
        error = refusal(await ann.post("/files", content=chunks(first, again), headers=headers), 413)
        assert "20000" in error["message"] and sent < 60
    unknown = b'--b\r\nContent-Disposition: form-data; name="colour"\r\n\r\nred\r\n'
    error = refusal(await ann.post("/files", content=chunks(unknown, b"x"), headers=headers), 400)
    assert error["param"] == "colour" and "choices: file, purpose" in error["message"] and sent < 2
    assert left_behind(service) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd"])
async def test_a_filename_never_becomes_a_path(service: Service, ann: httpx.AsyncClient, name: str) -> None:
    id = await upload(ann, name=name)
    assert left_behind(service) == [str(service.api.folders.files / f"{id}.jsonl")]
    assert "/" not in (await ann.get(f"/files/{id}")).json()["filename"]
    for path in ("..%2f..%2fetc%2fpasswd", "../jobs", "%2e%2e"):
        assert (await ann.get(f"/files/{path}/content")).status_code == 404


async def test_another_tenants_file_does_not_exist(ann: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    id = await upload(ann)
    for answer in (
        await bob.get(f"/files/{id}"),
        await bob.get(f"/files/{id}/content"),
        await bob.delete(f"/files/{id}"),
    ):
        assert refusal(answer, 404)["message"] == f"file '{id}' does not exist"
    assert (await bob.get("/files")).json()["data"] == []
    assert (await ann.get(f"/files/{id}")).status_code == 200


async def test_a_file_whose_content_is_gone_is_404(service: Service, ann: httpx.AsyncClient) -> None:
    id = await upload(ann)
    (service.api.folders.files / f"{id}.jsonl").unlink()
    assert "is gone" in refusal(await ann.get(f"/files/{id}/content"), 404)["message"]
    assert (await ann.delete(f"/files/{id}")).status_code == 200


async def test_a_file_that_a_job_needs_stays(service: Service, ann: httpx.AsyncClient) -> None:
    id = await upload(ann)
    job = (await ann.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": id})).json()["id"]
    assert job in refusal(await ann.delete(f"/files/{id}"), 409)["message"]
    assert (await ann.get(f"/files/{id}/content")).status_code == 200


async def test_a_full_disk_is_503_and_leaves_nothing(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    answer = await ann.post("/files", files={"file": ("a.jsonl", jsonl())}, data={"purpose": "fine-tune"})
    assert "full" in refusal(answer, 503)["message"]
    assert left_behind(service) == []


async def test_an_upload_to_a_full_disk_is_503_leaves_nothing_and_works_once_there_is_room(
    service: Service, ann: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", mib=1) as disk:
        monkeypatch.setattr(service, "api", replace(service.api, data=disk.folder))
        service.transport.app.state.api = service.api  # type: ignore[attr-defined]
        sent: dict[str, Any] = {
            "files": {"file": ("a.jsonl", jsonl(*[EXAMPLE] * 100))},
            "data": {"purpose": "fine-tune"},
        }
        for room in (0, 4096, 8192):  # none, and too little to write or to flush
            disk.fill(leaving=room)
            assert "full" in refusal(await ann.post("/files", **sent), 503)["message"]
            assert [path.name for path in disk.folder.rglob("*") if path.is_file()] == [FILLER]
            disk.make_room()
        assert (await ann.post("/files", **sent)).status_code == 200


async def test_an_upload_that_the_store_has_no_room_for_leaves_nothing(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WriteRefused("MISCONF secret")

    with monkeypatch.context() as patched:
        patched.setattr(service.api.store, "commit", refuse)
        answer = await ann.post("/files", files={"file": ("a.jsonl", jsonl())}, data={"purpose": "fine-tune"})
        assert "no room" in refusal(answer, 503)["message"] and int(answer.headers["retry-after"]) >= 10
    assert left_behind(service) == []
    assert await upload(ann)


async def test_a_store_that_is_down_is_503_with_retry_after(
    service: Service, ann: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await upload(ann)

    def down(*_: object, **__: object) -> None:
        raise StoreUnavailable("redis://secret-host does not answer")

    for method in ("get", "scan", "commit", "submit", "ping"):
        monkeypatch.setattr(service.api.store, method, down)
    for answer in (await ann.get(f"/files/{id}"), await ann.get("/files"), await ann.get("/models")):
        assert "secret" not in refusal(answer, 503)["message"] and answer.headers["retry-after"]
    async with httpx.AsyncClient(transport=service.transport, base_url="http://test") as nobody:
        refusal(await nobody.get("/healthz"), 503)


async def test_a_client_that_hangs_up_while_uploading_leaves_nothing(service: Service) -> None:
    """The ASGI server says http.disconnect in the middle of the body."""
    said = [
        {
            "type": "http.request",
            "body": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"m',
            "more_body": True,
        },
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, object]:
        return said.pop(0) if said else {"type": "http.disconnect"}  # type: ignore[return-value]

    async def send(_: object) -> None: ...

    headers = [
        (b"content-type", b"multipart/form-data; boundary=b"),
        (b"authorization", f"Bearer {service.keys['ann']}".encode()),
    ]
    scope: dict[str, object] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "headers": headers,
        "query_string": b"",
        "raw_path": b"/v1/files",
    }
    scope |= {
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    with suppress(Exception):  # what the server sees is not the point
        await service.transport.app(scope, receive, send)
    assert left_behind(service) == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"\\ud800": 1}',
        b'{"messages": [{"role": "\\udfff", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a", "\\ud800": 1}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "\\ud800": 1}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
        b'{"messages": [{"role": "user", "content": "a", "name": "\\ud800"}]}',
    ],
)
async def test_half_a_character_anywhere_in_a_line_is_a_refusal_that_names_it(
    ann: httpx.AsyncClient, line: bytes
) -> None:
    answer = await ann.post("/files", files={"file": ("a.jsonl", line)}, data={"purpose": "fine-tune"})
    assert "line 1" in refusal(answer, 400)["message"]

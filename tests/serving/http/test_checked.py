"""A file whose examples were checked for one job is not read again for the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polygraft.cluster.model import Limits, TenantId
from polygraft.cluster.policy.budget import state_bytes
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.grammar import parse
from polygraft.grafts.text.tokenise import Tokens
from polygraft.serving.http import submission
from polygraft.serving.http.checked import Checked
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.submission import new_job
from tests.serving.http.conftest import Service, upload
from tests.serving.http.test_jobs import body, supervised

pytestmark = pytest.mark.anyio
ANN = TenantId("ann")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read, in their order."""
    found: list[Path] = []
    encoded = submission.encoded

    def seen(api: Api, reading: submission.Reading, path: Path, param: str) -> Iterator[tuple[int, Tokens]]:
        found.append(path)
        return encoded(api, reading, path, param)

    monkeypatch.setattr(submission, "encoded", seen)
    return found


async def test_jobs_of_one_file_read_it_once_by_each_length_and_use(service: Service, read: list[Path]) -> None:
    file, other = await upload(service.as_("ann")), await upload(service.as_("ann"))
    for text in ("lora(r=2)", "ia3", "lora(r=4)"):
        new_job(service.api, ANN, body(file, validation_file=other, method=supervised(peft=text, max_length=64)))
    assert [path.stem for path in read] == [file, other]
    new_job(service.api, ANN, body(file, method=supervised(peft="ia3", max_length=63)))
    new_job(service.api, ANN, body(file, validation_file=file, method=supervised(peft="ia3", max_length=64)))
    assert [path.stem for path in read] == [file, other, file, file]


async def test_a_graft_that_leaves_less_room_is_refused_with_the_line_all_the_same(
    service: Service, read: list[Path]
) -> None:
    asked = body(await upload(service.as_("ann")), method=supervised(peft="ia3", max_length=64))
    new_job(service.api, ANN, asked)
    graft = BoundGraft(parse("ia3"), service.backbone.shape)
    room = Limits(pack_bytes=state_bytes(graft.parameters, graft.frozen) + StepCost(graft, 2).bytes([2]))
    with pytest.raises(ApiError, match="training_file: line 1 has"):
        new_job(replace(service.api, pack=lambda _: room), ANN, asked)
    assert len(read) == 2


async def test_a_file_that_is_gone_or_was_written_again_is_not_known(service: Service, read: list[Path]) -> None:
    asked = body(await upload(service.as_("ann")))
    new_job(service.api, ANN, asked)
    (path,) = read
    path.write_text("no example\n")
    with pytest.raises(ApiError, match="training_file: line 1"):
        new_job(service.api, ANN, asked)
    path.unlink()
    with pytest.raises(ApiError, match="gone; upload it again"):
        new_job(service.api, ANN, asked)


def test_only_the_last_files_are_known(tmp_path: Path) -> None:
    checked, files = Checked(kept=2), [tmp_path / name for name in "abc"]
    for longest, file in enumerate(files):
        file.touch()
        checked.note(file, "read", longest)
    assert [checked.longest(file, "read") for file in files] == [None, 1, 2]
    assert checked.longest(files[2], "otherwise") is None

"""A whole service whose home lies on a disk of 14 MiB that fills up while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from polygraft.cluster.service import Service, find_service, read_key
from polygraft.cluster.store.watch import LITTLE_BYTES
from polygraft.launch.run_folder import RunFolder
from tests.e2e.test_by_hand import TRAINING, Shell
from tests.small_disk import small_disk
from tests.tiny import tiny_llama


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sudden", [False, True])
def test_a_service_whose_disk_is_full_reads_on_and_takes_everything_up_once_there_is_room(
    sudden: bool, tmp_path: Path
) -> None:
    """Where it fills up faster than it is looked at, the store ends at its next write; it reads once it is up again."""
    tiny = tiny_llama(tmp_path / "tiny")
    with small_disk(tmp_path / "disk", mib=14) as disk:
        polygraft = Shell(disk.folder / "home")
        polygraft("up", "--port", "0", "--backbone", str(tiny), "--dtype", "fp32")
        try:
            client = Api(find_service(polygraft.home / "run" / "service.json"), read_key(polygraft.home / "api_key"))
            supervisor = RunFolder(polygraft.home).supervision
            assert supervisor is not None
            file = client.upload().json()["id"]
            before = client.submit(file, "before").json()["id"]
            taken = [before]

            def tried(name: str) -> int:
                answer = client.submit(file, name)
                if answer.status_code == 200:
                    taken.append(answer.json()["id"])
                return answer.status_code

            disk.fill(leaving=0 if sudden else LITTLE_BYTES // 2)
            until(lambda: tried("meanwhile") == 503)
            if sudden:
                until(lambda: client.get(f"fine_tuning/jobs/{before}").status_code == 200)
            disk.fill()
            assert client.upload().status_code == 503
            for _ in range(5):
                assert client.get(f"fine_tuning/jobs/{before}").status_code == 200
                assert client.chat().status_code == 200
                assert client.submit(file, "meanwhile").headers["retry-after"]
                time.sleep(1)
            disk.make_room()
            until(lambda: tried("after") == 200)
            until(lambda: {job["status"] for job in client.jobs()} == {"succeeded"}, timeout_s=120)
            assert sorted(str(job["id"]) for job in client.jobs()) == sorted(taken), "what was taken, and nothing else"
            assert {job["fine_tuned_model"] for job in client.jobs()} >= {"before@1", "after@1"}
            now = RunFolder(polygraft.home).supervision
            assert now is not None and now.supervisor == supervisor.supervisor
            assert now.children[-1] == supervisor.children[-1], "the head has not died"
        finally:
            polygraft("down")


class Api:
    def __init__(self, service: Service, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=f"{service.url}/v1/", headers=headers, timeout=60, trust_env=False)
        self._backbone = service.backbone

    def get(self, path: str) -> httpx.Response:
        return self._client.get(path)

    def upload(self) -> httpx.Response:
        files = {"file": ("a.jsonl", TRAINING.encode())}
        return self._client.post("files", files=files, data={"purpose": "fine-tune"})

    def submit(self, file: str, name: str) -> httpx.Response:
        hyper = {"n_epochs": 1, "peft": "lora(r=4)"}
        method = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
        body = {"model": self._backbone, "training_file": file, "suffix": name, "method": method}
        return self._client.post("fine_tuning/jobs", json=body)

    def chat(self) -> httpx.Response:
        messages = [{"role": "user", "content": "What is a graft?"}]
        return self._client.post(
            "chat/completions", json={"model": self._backbone, "messages": messages, "max_tokens": 4}
        )

    def jobs(self) -> list[dict[str, object]]:
        return list(self.get("fine_tuning/jobs").json()["data"])


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)

"""Thousands of generated bodies: no fault, no long answer, no growth, and another tenant notices nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from polygraft.cluster.store.embedded import EmbeddedServer
from tests.serving.http.bodies import Generated, cases, large_cases
from tests.serving.http.conftest import jsonl
from tests.serving.http.served import Served

ROOT = Path(__file__).parents[3]
ANSWER_S, NEIGHBOUR_S, GROWTH_BYTES = 10.0, 2.0, 50 << 20
GETS = ("/models", "/fine_tuning/jobs", "/files", "/grafts")
Statuses = dict[str, set[int]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("served")
    with EmbeddedServer(data / "store") as store:
        command = [sys.executable, "-m", "tests.serving.http.served", str(folder), str(data / "data"), store.url]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # as the ingress has it
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            yield Served(said["url"], said["keys"], said["pid"])
        finally:
            process.stdin.close()
            process.wait(30)
            process.stdout.close()


@pytest.fixture(scope="module")
def documented(served: Served) -> Statuses:
    """The statuses that the service's own document names, by path of a POST."""
    document = httpx.get(f"{served.url}/openapi.json", headers=served.headers("ann"), timeout=30).json()
    return {path: set(map(int, one["post"]["responses"])) for path, one in document["paths"].items() if "post" in one}


@contextmanager
def client(served: Served, tenant: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served.url}/v1", headers=served.headers(tenant), timeout=60) as found:
        yield found


@contextmanager
def neighbour(served: Served) -> Iterator[list[float]]:
    """Bob, who asks for what is his all the time; how long each answer took, in seconds."""
    waits: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        with client(served, "bob") as bob:
            while not stop.wait(0.02):
                at = time.monotonic()
                assert bob.get(GETS[len(waits) % len(GETS)]).status_code == 200
                waits.append(time.monotonic() - at)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


def send(ann: httpx.Client, case: Generated, documented: Statuses) -> None:
    at = time.monotonic()
    answer = ann.post(case.to, content=case.content, headers={"Content-Type": case.kind})
    took = time.monotonic() - at
    assert answer.status_code in documented[f"/v1{case.to}"], (answer.status_code, answer.text[:300])
    assert answer.status_code < 500 or answer.status_code == 503, answer.text[:300]
    assert answer.status_code == 200 or set(answer.json()) == {"error"}
    assert took < ANSWER_S, took


def hold(served: Served, documented: Statuses, examples: int, drawn: int = 0) -> None:
    with client(served, "ann") as ann:
        content = jsonl()
        file = ann.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
        for case in large_cases()[::7]:
            send(ann, case, documented)  # so that what is kept once is there
        before = served.rss

        @seed(drawn)
        @settings(
            max_examples=examples,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=False,
        )
        @given(cases(file))
        def generated(case: Generated) -> None:
            send(ann, case, documented)

        with neighbour(served) as waits:
            generated()
            for case in large_cases():
                send(ann, case, documented)
        assert len(waits) > 20 and sorted(waits)[int(len(waits) * 0.99)] < NEIGHBOUR_S and max(waits) < NEIGHBOUR_S
        assert any(_grown(served, before) < GROWTH_BYTES for _ in range(10)), (before, served.rss)


def _grown(served: Served, before: int) -> int:
    """How much larger the process is, after half a second more in which it may give memory back."""
    time.sleep(0.5)
    return served.rss - before


def test_generated_bodies_harm_nobody(served: Served, documented: Statuses) -> None:
    hold(served, documented, 300)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("share", range(1, 21))
def test_twenty_thousand_generated_bodies_harm_nobody(served: Served, documented: Statuses, share: int) -> None:
    hold(served, documented, 1000, share)


@pytest.mark.parametrize("examples", [3, pytest.param(100, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])])
def test_the_document_is_true(served: Served, examples: int, tmp_path: Path) -> None:
    """Schemathesis: every status, content type and answer as documented, wrong data refused, no fault. What a schema
    cannot say (a file of that id, a prompt that fits) may be refused, too: `positive_data_acceptance`."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
    options = {
        "--header": f"Authorization: {served.headers('ann')['Authorization']}",
        "--exclude-checks": "positive_data_acceptance",
        "--max-examples": str(examples),
        "--seed": "1",
        "--workers": "1",
        "--max-response-time": str(ANSWER_S),
    }
    told = [word for option in options.items() for word in option]
    done = subprocess.run([*command, *told, "--no-color"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]

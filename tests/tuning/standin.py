"""A service's job API, played: jobs take a fixed time, obey leases, and end with a loss that follows their size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Header, HTTPException
from pydantic import JsonValue

from polygraft.cluster.spec import FineTuningRequest, read_request
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.sites import ModelShape

SHAPE = ModelShape(arch="llama", layers=6, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)
KEY = "pg-stand-in"
STEPS = 10


@dataclass
class PlayedJob:
    request: FineTuningRequest
    id: str
    began_at: float
    seconds: float
    lease_until: float
    renewed_at: list[float] = field(default_factory=list)
    ended: str | None = None

    def status(self, now: float) -> str:
        if self.ended is None and now >= self.began_at + self.seconds <= self.lease_until:
            self.ended = "succeeded"
        if self.ended is None and now >= self.lease_until:
            self.ended = "cancelled"
        return self.ended or "running"


class StandIn:
    """`seconds` is how long the job of a trial trains; `url` is where the API answers, without /v1."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}
        self.jobs: dict[str, PlayedJob] = {}
        self.widest = 0
        self.down = False
        self.any_key = False  # whether it takes keys that others made
        self.lists = True  # whether it says which jobs there are
        self.url = ""

    def of_trial(self, number: int) -> PlayedJob:
        return next(job for job in self.jobs.values() if (job.request.metadata or {})["trial"] == str(number))

    def status(self, job: PlayedJob) -> str:
        return job.status(time.monotonic())

    def create(self, body: JsonValue, key: str) -> dict[str, JsonValue]:
        with self._lock:
            if key not in self._keys:
                request = read_request(body)
                number, now = int((request.metadata or {})["trial"]), time.monotonic()
                assert request.owner is not None
                job = PlayedJob(
                    request, f"ftjob-{len(self.jobs)}", now, self._seconds(number), now + request.owner.lease_s
                )
                self.jobs[job.id] = job
                self._keys[key] = job.id
                running = sum(self.status(other) == "running" for other in self.jobs.values())
                self.widest = max(self.widest, running)
            return self.show(self._keys[key])

    def show(self, name: str) -> dict[str, JsonValue]:
        if self.down:
            raise HTTPException(503, {"error": {"message": "the store is down"}})
        job, now = self.jobs[name], time.monotonic()
        status = job.status(now)
        size = BoundGraft(job.request.graft, SHAPE).parameters  # type: ignore[arg-type]
        done = status == "succeeded"
        return {
            "id": job.id,
            "status": status,
            "model": job.request.model,
            "created_at": 0,
            "parameters": size,
            "step": STEPS if done else min(STEPS - 1, int(STEPS * (now - job.began_at) / job.seconds)),
            "steps_total": STEPS,
            "loss_before": 4.0,
            "loss_after": loss_of(size) if done else None,
            "fine_tuned_model": f"{job.request.suffix}@1" if done else None,
        }

    def metrics(self, name: str) -> list[JsonValue]:
        """The training losses of the steps so far, newest first."""
        shown = self.show(name)
        level, done = loss_of(int(str(shown["parameters"]))), int(str(shown["step"]))
        return [
            {
                "id": f"{name}-{step}",
                "created_at": 0,
                "level": "info",
                "message": "",
                "type": "metrics",
                "data": {"step": step, "loss": level + 1 / step},
            }
            for step in range(done, 0, -1)
        ]

    def renew(self, name: str, lease_s: float) -> dict[str, JsonValue]:
        with self._lock:
            job, now = self.jobs[name], time.monotonic()
            if self.status(job) == "running":
                job.lease_until = now + lease_s
                job.renewed_at.append(now)
            return self.show(name)

    def cancel(self, name: str) -> dict[str, JsonValue]:
        with self._lock:
            if self.status(self.jobs[name]) == "running":
                self.jobs[name].ended = "cancelled"
            return self.show(name)


def peft_of(job: PlayedJob) -> str:
    method = job.request.method
    assert method and method.supervised and method.supervised.hyperparameters
    return method.supervised.hyperparameters.peft.text


def loss_of(size: int) -> float:
    """Falls with the size of the graft, so that every trial is on the front."""
    return 1.0 + 100.0 / (100.0 + size)


@contextmanager
def stand_in(seconds: Callable[[int], float]) -> Iterator[StandIn]:
    """Serves the API on a free port until the context ends."""
    service = StandIn(seconds)
    server = uvicorn.Server(uvicorn.Config(_app(service), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    service.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join()


def _app(service: StandIn) -> FastAPI:
    app = FastAPI()

    def check(authorization: str) -> None:
        if authorization != f"Bearer {KEY}" and not service.any_key:
            raise HTTPException(401, {"error": {"message": "wrong key"}})

    @app.post("/v1/fine_tuning/jobs")
    def create(
        body: dict[str, JsonValue], authorization: str = Header(), idempotency_key: str = Header()
    ) -> dict[str, JsonValue]:
        check(authorization)
        return service.create(body, idempotency_key)

    @app.get("/v1/fine_tuning/jobs")
    def jobs(limit: int, authorization: str = Header()) -> dict[str, JsonValue]:
        check(authorization)
        if not service.lists:
            raise HTTPException(404, {"error": {"message": "no list"}})
        newest = list(reversed(list(service.jobs)))
        return {"data": [service.show(job) for job in newest[:limit]], "has_more": len(newest) > limit}

    @app.get("/v1/fine_tuning/jobs/{job}")
    def show(job: str, authorization: str = Header()) -> dict[str, JsonValue]:
        check(authorization)
        return service.show(job)

    @app.get("/v1/fine_tuning/jobs/{job}/events")
    def events(job: str, authorization: str = Header()) -> dict[str, JsonValue]:
        check(authorization)
        return {"data": [*service.metrics(job)], "has_more": False}

    @app.post("/v1/fine_tuning/jobs/{job}/renew")
    def renew(job: str, body: dict[str, float], authorization: str = Header()) -> dict[str, JsonValue]:
        check(authorization)
        return service.renew(job, body["lease_s"])

    @app.post("/v1/fine_tuning/jobs/{job}/cancel")
    def cancel(job: str, authorization: str = Header()) -> dict[str, JsonValue]:
        check(authorization)
        return service.cancel(job)

    return app

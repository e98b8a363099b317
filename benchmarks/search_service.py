"""Our arm of the search benchmark: the whole service, asked over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from harness import ArmFailed
from over_http_servers import MODEL, Ours
from pydantic import JsonValue
from search_work import ALPHA, START, WARM, WARM_TRIAL, Work, request

from polygraft.cluster import searches
from polygraft.cluster.client import Client

_LOOK_S = 0.5


class Searching:
    """A service with an open pack. Its methods raise ArmFailed."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._folder, self._work = folder, work
        start = folder / START
        self._start = {START: start} if start.exists() else {}
        self._service = Ours(folder / f"home-{time.monotonic_ns()}", self._start)
        self._client = Client(self._service.url, self._service.key, timeout_s=120.0)
        self.bare = self.trained = 0.0

    def warm(self) -> None:
        """Upload the files and train a job of a few examples, which opens the pack. `bare` is then the backbone's
        held-out loss by the service, and `trained` that of the job, which begins with PEFT's start where there is
        one."""
        self._train, self._held_out = (
            self._client.upload(self._folder / f"{part}.jsonl").id for part in ("train", "held_out")
        )
        lines = (self._folder / "train.jsonl").read_bytes().splitlines(keepends=True)[:WARM]
        few = self._client.upload(b"".join(lines), filename="few.jsonl").id
        body = self._body(self._train, self._held_out)
        given = body["hyperparameters"]
        assert isinstance(given, dict)
        peft = f"lora(r={WARM_TRIAL.rank}, alpha={ALPHA}, at=attn.q|attn.v)"  # as PEFT's folder is read
        peft += f" + from(of={START})" if self._start else ""
        given = {**given, "peft": peft, "learning_rate": WARM_TRIAL.learning_rate}
        job = self._client.create_job(
            {
                "model": MODEL,
                "training_file": few,
                "validation_file": self._held_out,
                "method": {"type": "supervised", "supervised": {"hyperparameters": given}},
            }
        )
        job = self._client.wait(job.id)
        if job.loss_before is None or job.loss_after is None:
            raise ArmFailed(f"the job that warms the pack is {job.status}: {job.error}")
        self.bare, self.trained = job.loss_before, job.loss_after

    def round(self) -> tuple[float, Mapping[int, float]]:
        """Seconds from asking for the search to its end, and the held-out losses by trial."""
        start = time.monotonic()
        search = searches.create(self._client, self._body(self._train, self._held_out))
        while not search.final:
            time.sleep(_LOOK_S)
            search = searches.show(self._client, search.id)
        seconds = time.monotonic() - start
        if search.status != "succeeded":
            raise ArmFailed(f"the search is {search.status}: {search.note}")
        trials = list(searches.trials(self._client, search.id))
        failed = [trial for trial in trials if trial.state == "failed"]
        if failed or len(trials) != len(self._work.trials):
            raise ArmFailed(f"{len(trials)} trials, {len(failed)} of them failed")
        return seconds, {trial.number: trial.loss for trial in trials if trial.loss is not None}

    def pss(self) -> int:
        return self._service.pss()

    def close(self) -> None:
        self._client.close()
        self._service.close()

    def _body(self, train: str, held_out: str) -> dict[str, JsonValue]:
        work = self._work
        batch = len(work.order[0])
        return request(batch, halving=work.halving, training_file=train, validation_file=held_out)

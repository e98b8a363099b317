"""A trial while it runs: a light actor that submits a job to the service, speaks for it while Tune wants it, and
reports how it goes.

The job's owner is the trial. Its steps renew the owner's lease, so a trial that is killed, or whose driver is, leaves a
job that the service cancels by itself. One that leaves its trial leaves the job as it is: another actor comes to it, or
the driver has cancelled it. It imports next to nothing, since it is a process: the work is in the pack, and what a plan
is made of in the driver.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from secrets import token_hex

from pydantic import JsonValue
from ray import tune

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.service import ServiceNotRunning
from polygraft.tuning.owned import submitted
from polygraft.tuning.terms import CALL_S, Access, Terms

POLL_S = 0.5  # between two looks at a job, at least
_SHARE = 0.05  # of the time that a trial runs already, by which what happens to its job may be seen too late
_PASSING = (0, 429, 503)  # statuses that say "not now": no answer, too many, a dependency is down


class JobTrial(tune.Trainable):
    """Config: its `number` and the `body` of its job. Results: `done`, `progress` in [0, 1], `job`; at the end `loss`,
    `scores` as pairs of name and value, `parameters`, `loss_before` and `model`, or `failure` with the reason.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, object]) -> tune.PlacementGroupFactory:
        """Next to nothing (Tune refuses nothing): a trial only waits; with Ray's default two would fill two cores."""
        return tune.PlacementGroupFactory([{"CPU": 0.01}])

    # The other arguments come from tune.with_parameters, so that the key stays out of the files that Tune writes.
    def setup(  # type: ignore[override]
        self, config: dict[str, object], access: Access, terms: Terms
    ) -> None:
        self._client = Client(access.url, access.key, timeout_s=min(CALL_S, terms.lease_s / 2))
        self._terms = terms
        self._begin(config)

    def reset_config(self, new_config: dict[str, object]) -> bool:
        """The same actor for another trial."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, object]:
        """One look at the job; Tune can stop the trial between two."""
        if self._job is not None:
            time.sleep(self._pause_s(self._job))
        try:
            self._look()
        except ApiFailure as error:
            if error.status not in _PASSING or self._late():
                return {"done": True, "failure": f"{error} (HTTP {error.status})", **self._facts()}
        except ServiceNotRunning as error:
            if self._late():
                return {"done": True, "failure": str(error), **self._facts()}
        if self._job is not None and self._job.final:
            return {"done": True, **_outcome(self._job), **self._facts()}
        if self._job is None:
            time.sleep(POLL_S)
        return {"done": False, **self._facts()}

    def cleanup(self) -> None:
        self._client.close()

    def _begin(self, config: dict[str, object]) -> None:
        body = config["body"]
        assert isinstance(body, dict), "a trial has the body of its job"
        self._body: Mapping[str, JsonValue] = body
        self._name = str(config["number"])
        self._job: RemoteJob | None = None
        self._begun_at = self._heard_at = self._renewed_at = time.monotonic()  # heard: the service last answered

    def _pause_s(self, job: RemoteJob) -> float:
        """Until the next look: the longer the trial runs and has to run, the longer."""
        so_far, steps = time.monotonic() - self._begun_at, job.steps_total or 0
        left = so_far * (steps / job.step - 1) if job.step else so_far
        return min(max(POLL_S, min(_SHARE * so_far, left / 2)), self._terms.lease_s / 6)

    def _look(self) -> None:
        """Submit the job, or see how it is; renew its lease when a third of it is over."""
        if self._job is None:
            self._job = self._submit()
            self._renewed_at = time.monotonic()
        elif time.monotonic() - self._renewed_at > self._terms.lease_s / 3:
            self._job = self._client.renew(self._job.id, self._terms.lease_s)
            self._renewed_at = time.monotonic()
        else:
            self._job = self._client.job(self._job.id)
        self._heard_at = time.monotonic()

    def _submit(self) -> RemoteJob:
        terms = self._terms
        return submitted(self._client, self._body, study=terms.study, name=self._name, lease_s=terms.lease_s)

    def _late(self) -> bool:
        """Whether the service was silent for so long that the job's lease is over."""
        return time.monotonic() - self._heard_at > self._terms.lease_s

    def _facts(self) -> dict[str, JsonValue]:
        job = self._job
        if job is None:
            return {"progress": 0.0, "job": None}
        share = 1.0 if job.final else min(1.0, job.step / (job.steps_total or 1))
        return {"progress": share, "job": job.id}


def trials_of(study: str, access: Access, terms: Terms) -> type[tune.Trainable]:
    """The trials of one driver, with its tenant's key. Tune finds a trainable by its name alone, which all drivers of a
    service would share: a trial would be run with the access of whichever search began last."""
    trainable: type[tune.Trainable] = tune.with_parameters(JobTrial, access=access, terms=terms)
    trainable.__name__ = f"{JobTrial.__name__}-{study}-{token_hex(4)}"
    return trainable


def _outcome(job: RemoteJob) -> dict[str, JsonValue]:
    if job.status != "succeeded":
        return {"failure": job.error.message if job.error else f"the job was {job.status}"}
    if job.loss_after is None:
        return {"failure": "the job succeeded without a held-out loss"}
    told: list[JsonValue] = [[name, value] for name, value in job.scores_after.items()]
    scores: dict[str, JsonValue] = {"scores": told} if told else {}
    return {
        **scores,
        "loss": job.loss_after,
        "parameters": job.parameters,
        "loss_before": job.loss_before,
        "model": job.fine_tuned_model,
    }

"""Runs a search: jobs are begun ahead, Ray Tune's actors speak for them, our study decides what they are.

A driver that is started again reads the study's record, begins with the trials that were running, takes over their
jobs, and asks for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.ids import new_study_id
from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.service import ServiceNotRunning
from polygraft.cluster.store.base import Store
from polygraft.tuning.ahead import LEASE_S, Ahead, OnTrial
from polygraft.tuning.owned import submitted
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.pruners.choose import pruner
from polygraft.tuning.pruners.watch import Watch
from polygraft.tuning.record import open_study
from polygraft.tuning.stops import Jobs, Stops
from polygraft.tuning.study import Study, Trial
from polygraft.tuning.terms import CALL_S, Access, Terms

ACTORS = 1  # that sees how jobs go: each is a process, whose imports alone are seconds of a core
NEWEST = 100  # jobs, of one request, among which those that are over are looked for; older ones are told in their turn


@dataclass(frozen=True, slots=True)
class StudyResult:
    """All trials in the order they were asked in, and those of the front from the smallest graft up; why the search
    ended before all were run, if it did."""

    id: StudyId
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    ended: str | None = None


class Interrupted(Exception):
    """The search was stopped from outside; the same call with the same study goes on with it."""


def search(  # noqa: PLR0913
    plan: SearchPlan,
    *,
    store: Store,
    access: Access,
    tenant: TenantId,
    folder: Path,
    study: StudyId | None = None,
    on_trial: OnTrial = lambda trial: None,
    clock: Callable[[], float] = time.time,
) -> StudyResult:
    """Run the plan's trials to their end, or the rest of them when `study` was begun before.

    This process must be connected to Ray, where the trials' actors live. Tune's files go to folder/<study>. `on_trial`
    sees every trial when it is asked and when it is told. Raises Interrupted after SIGINT, BadRecord for a study of
    another plan, and what the store raises.
    """
    name = study or new_study_id()
    opened = open_study(store, name, plan, tenant=tenant, clock=clock)
    terms = Terms(name, plan.lease_s)
    with Client(access.url, access.key, timeout_s=CALL_S) as client:
        over = partial(_over, client, min(2 * plan.concurrency, NEWEST))
        ahead = Ahead(name, opened, plan, on_trial, partial(_begin, client, terms), over)
        if ahead.left:
            ahead.fill()
            from polygraft.tuning.bridge import StudySearcher, fit  # Ray Tune, a second of a core, while jobs train
            from polygraft.tuning.trial import trials_of

            bridge = StudySearcher(ahead, plan, on_trial, stops_of(plan, opened, client))
            fit(trials_of(name, access, terms), bridge, folder / name, at_once=ACTORS)
            if not bridge.finished:
                raise Interrupted(
                    f"the search was stopped after {bridge.told} of {plan.trials} trials; run it again to go on"
                )
    return StudyResult(name, opened.trials, opened.front, ahead.ended)


def stops_of(plan: SearchPlan, study: Study, jobs: Jobs, clock: Callable[[], float] = time.monotonic) -> Stops | None:
    """As the plan's pruner says."""
    judge = pruner(plan.pruner)
    if judge is None:
        return None
    known = {trial.candidate.peft: plan.known(trial.candidate.peft) for trial in study.trials}
    return Stops(Watch(judge, study.trials, known), plan, jobs, clock)


def _begin(client: Client, terms: Terms, number: int, body: Mapping[str, JsonValue]) -> str | None:
    """Submit the job of a trial, which trains while its actor's process starts. What goes wrong the actor meets again,
    and says."""
    lease_s = max(terms.lease_s, LEASE_S)
    with suppress(ApiFailure, ServiceNotRunning):
        return submitted(client, body, study=terms.study, name=str(number), lease_s=lease_s).id
    return None


def _over(client: Client, newest: int) -> frozenset[str]:
    """Which of the tenant's newest jobs have ended; none while the service does not answer."""
    with suppress(ApiFailure, ServiceNotRunning):
        return frozenset(job.id for job in client.jobs(newest) if job.final)
    return frozenset()

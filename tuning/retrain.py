"""Trains members of a finished search's front again, chooses one, and writes both into the study's record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.client import Client
from polygraft.cluster.model import StudyId
from polygraft.cluster.scores import Scores
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.tuning.finals import Final, chosen, members, retrained
from polygraft.tuning.owned import submitted
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.record import BadRecord, StudyRecord, decode, encode
from polygraft.tuning.study import Trial

POLL_S = 1.0
TellFinal = Callable[[Final], None]


def retrain(  # noqa: PLR0913
    store: Store,
    study: StudyId,
    front: Sequence[Trial],
    client: Client,
    *,
    tell: TellFinal = lambda final: None,
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] = time.sleep,
) -> StudyRecord:
    """The record with all finals and the chosen trial. Those that an earlier driver wrote are not trained again; its
    running jobs are taken over. Raises BadRecord, and what client and store raise."""
    record = _read(store, study)
    plan = record.plan
    have = {(final.trial, final.seed) for final in record.finals}
    pairs = [(trial, seed) for trial in retrained(front) for seed in range(1, plan.seeds + 1)]
    waiting = [(trial, seed) for trial, seed in pairs if (trial.number, seed) not in have]
    running: dict[tuple[int, int], RemoteJob] = {}
    renewed = clock()
    while waiting or running:
        while waiting and len(running) < plan.concurrency:
            trial, seed = waiting.pop(0)
            running[trial.number, seed] = _submit(client, plan, study, trial, seed)
        late = clock() - renewed > plan.lease_s / 3
        renewed = clock() if late else renewed
        for (number, seed), job in list(running.items()):
            seen = client.renew(job.id, plan.lease_s) if late else client.job(job.id)
            if seen.final:
                del running[number, seed]
                final = _final(number, seed, seen)
                record = _write(store, study, lambda r, final=final: replace(r, finals=(*r.finals, final)), clock)  # type: ignore[misc]
                tell(final)
        if running:
            pause(POLL_S)
    return _choose(store, study, record, client, clock)


def _choose(
    store: Store, study: StudyId, record: StudyRecord, client: Client, clock: Callable[[], float]
) -> StudyRecord:
    """Write the chosen trial; its first seed's graft is what the search's name means from now on, if that was asked."""
    measured = record.plan.measured
    found = chosen(members(record.trials, record.finals, measured), record.plan.choose, measured)
    if found is None:
        return record
    if record.plan.promote:
        done = [final for final in record.finals if final.trial == found.trial and final.model is not None]
        if done:
            client.promote_graft(str(min(done, key=lambda final: final.seed).model))
    return _write(store, study, lambda one: replace(one, chosen=found.trial), clock)


def _final(trial: int, seed: int, job: RemoteJob) -> Final:
    return Final(
        trial=trial,
        seed=seed,
        job=job.id,
        model=job.fine_tuned_model,
        loss=job.loss_after,
        scores=Scores.of(job.scores_after),
        test_loss=job.test_loss,
        test_scores=Scores.of(job.test_scores),
    )


def _submit(client: Client, plan: SearchPlan, study: StudyId, trial: Trial, seed: int) -> RemoteJob:
    what = trial.candidate
    body = plan.final_request(
        study=study, number=trial.number, peft=what.peft, learning_rate=what.learning_rate, seed=seed
    )
    return submitted(client, body, study=study, name=f"final/{trial.number}/{seed}", lease_s=plan.lease_s)


def _read(store: Store, study: StudyId) -> StudyRecord:
    found = store.get(keys.study(study))
    if found is None:
        raise BadRecord(f"study: {study} has no record")
    return decode(found.value.body)


def _write(
    store: Store, study: StudyId, change: Callable[[StudyRecord], StudyRecord], clock: Callable[[], float]
) -> StudyRecord:
    found = store.get(keys.study(study))
    if found is None:
        raise BadRecord(f"study: {study} has no record")
    record = change(decode(found.value.body))
    value = replace(found.value, body=encode(record), updated_at=clock())
    store.commit([Write(found.key, value, found.version)])
    return record

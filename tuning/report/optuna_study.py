"""A search as a study in Optuna's own storage, for what reads that: optuna-dashboard, plots, importances."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import optuna

from polygraft.tuning.report.summary import Report
from polygraft.tuning.samplers.optuna import distribution, quiet
from polygraft.tuning.spaces.parameters import Choice, Parameter, Whole
from polygraft.tuning.study import Failure, Result, Stopped, Trial

_STATES = {
    "running": optuna.trial.TrialState.RUNNING,
    "complete": optuna.trial.TrialState.COMPLETE,
    "failed": optuna.trial.TrialState.FAIL,
}


def export(report: Report, parameters: Sequence[Parameter], path: Path) -> None:
    """Write an SQLite file with a study named as the search's id; one that is there is replaced. A stopped trial is
    pruned, which studies of several objectives do not know: there it has failed. Graft, learning rate, job and the
    reason for having no values are the trials' user attributes, curves their intermediate values."""
    with quiet():
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
        with suppress(KeyError):
            optuna.delete_study(study_name=report.id, storage=storage)
        study = optuna.create_study(
            study_name=report.id, storage=storage, directions=["minimize"] * len(report.objectives)
        )
        study.set_metric_names(list(report.objectives))
        study.set_user_attr("name", report.name)
        study.add_trials([_trial(trial, parameters, report.objectives) for trial in report.trials])
        storage.remove_session()


def _trial(trial: Trial, parameters: Sequence[Parameter], objectives: Sequence[str]) -> optuna.trial.FrozenTrial:
    pruned = optuna.trial.TrialState.PRUNED if len(objectives) == 1 else optuna.trial.TrialState.FAIL
    outcome = trial.outcome
    facts: dict[str, object] = {"graft": trial.candidate.peft, "learning rate": trial.candidate.learning_rate}
    if outcome is not None:
        facts["job"] = outcome.job
    if isinstance(outcome, Failure | Stopped):
        facts["reason"] = outcome.reason
    there = [one for one in parameters if one.name in trial.config]
    whole = {one.name for one in there if isinstance(one, Whole | Choice)}
    curve = outcome.curve if isinstance(outcome, Result | Stopped) and len(objectives) == 1 else ()
    return optuna.trial.create_trial(
        state=_STATES.get(trial.state, pruned),
        params={name: int(value) if name in whole else value for name, value in trial.config.items()},
        distributions={one.name: distribution(one) for one in there},
        values=trial.values,
        intermediate_values=dict(enumerate(curve)),
        user_attrs=facts,
    )

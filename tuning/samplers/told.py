"""An Optuna study that goes on from one proposal to the next: it is told only what is new since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from polygraft.tuning.study import Trial


class Told:
    """Knows the trials that it was told, in their order. What was asked of it is no trial of it: it failed, and no
    model looks at failures."""

    def __init__(self, objectives: int) -> None:
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(storage=self._storage, directions=["minimize"] * objectives)
        self._id = self._storage.get_study_id_from_name(self._study.study_name)
        self._trials: list[Trial] = []
        self._ids: list[int] = []  # Optuna's, of each of them

    def leads_to(self, trials: Sequence[Trial]) -> bool:
        """Whether `trials` are those told and what came of them since, with new ones after them."""
        return len(self._trials) <= len(trials) and all(map(_leads_to, self._trials, trials))

    def tell(self, trials: Sequence[Trial], known: Callable[[Trial], FrozenTrial]) -> None:
        """Of `trials`, to which it leads, what is new; `known` is how Optuna knows a trial."""
        for number, trial in enumerate(trials):
            if number == len(self._trials):
                self._ids.append(self._storage.create_new_trial(self._id, known(trial)))
                self._trials.append(trial)
            elif self._trials[number].outcome is None and trial.outcome is not None:
                self._finish(self._ids[number], known(trial))
                self._trials[number] = trial

    @contextmanager
    def asked(
        self, sampler: optuna.samplers.BaseSampler, distributions: dict[str, BaseDistribution] | None
    ) -> Iterator[optuna.Trial]:
        """The next trial, to suggest parameters to; with `distributions` it has them all."""
        # NSGA-II keeps its parents there, which come back in another order.
        for name in self._storage.get_study_system_attrs(self._id):
            self._storage.set_study_system_attr(self._id, name, None)
        self._study.sampler = sampler
        trial = self._study.ask(distributions)
        yield trial
        self._study.tell(trial, state=TrialState.FAIL)

    def _finish(self, id: int, known: FrozenTrial) -> None:
        for name, value in known.system_attrs.items():
            self._storage.set_trial_system_attr(id, name, value)
        for step, value in known.intermediate_values.items():
            self._storage.set_trial_intermediate_value(id, step, value)
        self._storage.set_trial_state_values(id, known.state, known.values)


def _leads_to(old: Trial, new: Trial) -> bool:
    return new is old or new == old or (old.outcome is None and replace(new, outcome=None) == old)

"""Ask, tell, and the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from polygraft.tuning.objectives import LOSS, PARAMETERS
from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.parameters import Config
from polygraft.tuning.study import ATTEMPTS, Exhausted, Failure, Result, Study, Trial, TrialState, pareto
from tests.tuning.standin import SHAPE

SPACE = autopeft(SHAPE, groups=1, largest=4, longest=4)
ALL_OFF = {"serial": 3, "parallel": 3, "prefix": 3, "layers_0_5": 1, "learning_rate": 1e-3}


@dataclass
class Listed:
    """Proposes what it was given, in order, the last one for ever."""

    configs: list[Config]

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        return self.configs.pop(0) if len(self.configs) > 1 else self.configs[0]


def study_of(*sizes: int, **options: object) -> Study:
    """A study whose sampler proposes serial adapters of these sizes (0: everything off)."""
    exponents = {4: 0, 2: 1, 1: 2, 0: 3}
    configs: list[Config] = [{**ALL_OFF, "serial": exponents[size]} for size in sizes]
    return Study(SPACE, (LOSS, PARAMETERS), Listed(configs), **options)  # type: ignore[arg-type]


def told(*values: tuple[float, float] | None) -> list[Trial]:
    return [
        Trial(
            number=number,
            config={},
            candidate=Candidate(f"lora({number + 1})", 1e-3, 1),
            told=0,
            outcome=Failure(reason="lost") if pair is None else Result(values=pair),
        )
        for number, pair in enumerate(values)
    ]


def test_a_trial_says_how_many_results_were_told_when_it_was_asked() -> None:
    study = study_of(4, 2, 1)
    assert [study.ask().told, study.ask().told] == [0, 0]
    study.tell(1, Result(values=(1.0, 10.0)))
    study.tell(0, Failure(reason="diverged"))
    assert study.ask().told == 1
    assert [trial.state for trial in study.trials] == [TrialState.FAILED, TrialState.COMPLETE, TrialState.RUNNING]


def test_invalid_and_tried_configurations_are_asked_for_again() -> None:
    study = study_of(0, 4, 0, 4, 4, 2)
    assert [study.ask().candidate.peft, study.ask().candidate.peft] == ["serial(4)", "serial(2)"]


def test_a_failed_configuration_is_not_tried_again() -> None:
    study = study_of(4, 4, 2)
    study.tell(study.ask().number, Failure(reason="out of memory"))
    assert study.ask().candidate.peft == "serial(2)"


def test_a_used_up_space_ends_the_asking_after_a_bounded_number_of_proposals() -> None:
    proposed = []

    class Counting(Listed):
        def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
            proposed.append(attempt)
            return super().propose(trials, attempt)

    study = Study(SPACE, (LOSS, PARAMETERS), Counting([ALL_OFF]))
    with pytest.raises(Exhausted, match="widen the space"):
        study.ask()
    assert proposed == list(range(ATTEMPTS))
    assert study.trials == ()


@pytest.mark.parametrize("values", [(float("nan"), 10.0), (float("inf"), 10.0), (1.0, 0.0)])
def test_a_value_no_model_can_learn_from_is_told_as_a_failure(values: tuple[float, float]) -> None:
    study = study_of(4)
    trial = study.tell(study.ask().number, Result(values=values, job="ftjob-1"))
    assert trial.state is TrialState.FAILED
    assert isinstance(trial.outcome, Failure) and trial.outcome.job == "ftjob-1"
    assert not any(other.state is TrialState.RUNNING for other in study.trials)


def test_only_a_running_trial_can_be_told() -> None:
    study = study_of(4)
    with pytest.raises(ValueError, match="trial 0 is not running"):
        study.tell(0, Failure(reason="lost"))
    study.tell(study.ask().number, Result(values=(1.0, 2.0)))
    with pytest.raises(ValueError, match="trial 0 is not running"):
        study.tell(0, Result(values=(1.0, 2.0)))


def test_a_result_has_one_value_an_objective() -> None:
    study = study_of(4)
    study.ask()
    with pytest.raises(ValueError, match="1 for 2 objectives"):
        study.tell(0, Result(values=(1.0,)))


def test_what_cannot_be_kept_has_not_happened() -> None:
    def refuse(trials: tuple[Trial, ...]) -> None:
        raise ConnectionError("the store is down")

    study = study_of(4, keep=refuse)
    with pytest.raises(ConnectionError):
        study.ask()
    assert study.trials == ()


def test_the_front_is_what_nothing_beats_from_the_smallest_up() -> None:
    trials = told((1.0, 50.0), (2.0, 10.0), (1.5, 20.0), (1.6, 30.0), None, (2.0, 11.0), (0.9, 50.0))
    assert [trial.number for trial in pareto(trials)] == [1, 2, 6]


def test_equal_trials_are_both_on_the_front() -> None:
    assert [trial.number for trial in pareto(told((1.0, 1.0), (1.0, 1.0), (2.0, 1.0)))] == [0, 1]
    assert pareto(told(None)) == ()

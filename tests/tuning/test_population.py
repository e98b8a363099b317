"""Population based training: who goes on from whom, with which rate, whoever is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.model import JobSpec
from polygraft.cluster.rung import Rung
from polygraft.cluster.spec import read_request
from polygraft.tuning.plan import BadPlan, SearchPlan
from polygraft.tuning.samplers.population import FACTORS, Population
from polygraft.tuning.space import LEARNING_RATE, Candidate, Rates, Searched, Space, Term
from polygraft.tuning.spaces.parameters import Config
from polygraft.tuning.study import Failure, NotYet, Outcome, Part, Result, Study, Trial, as_seen
from tests.tuning.bridged import bridged
from tests.tuning.plans import plan_of
from tests.tuning.standin import SHAPE

SIZE, ROUNDS = 10, 3
SPACE = Space(SHAPE, (Term("lora", "lora", (Searched("r", (2, 4, 8)),)),), Rates(1e-4, 1e-2))
PLAN = replace(plan_of(SIZE * ROUNDS, space=SPACE, model="lhs"), model="pbt", startup=SIZE, minimise=("loss",))


def study_of(plan: SearchPlan) -> Study:
    return Study(plan.space, plan.objectives, plan.sampler, part=plan.part)


def told(trial: Trial) -> Outcome:
    """Member 7 is lost in the first round; the loss of the others falls with the number of the member."""
    if trial.number == 7:
        return Failure(reason="lost")
    return Result(
        values=(2.0 - 0.1 * (trial.number % SIZE) - 0.01 * (trial.number // SIZE),), job=f"job-{trial.number}"
    )


def searched(turn: int) -> Study:
    """As many at once as are asked for, told from another end in every turn."""
    study, running = study_of(PLAN), list[Trial]()
    while len(study.trials) < PLAN.trials or running:
        try:
            while len(study.trials) < PLAN.trials:
                running.append(study.ask())
        except NotYet:
            pass
        trial = running.pop(-turn)
        study.tell(trial.number, told(trial))
    return study


def test_a_round_waits_for_the_one_before_and_is_the_same_whoever_ends_first() -> None:
    one, other = searched(0).trials, searched(1).trials
    assert [(t.config, t.parent) for t in one] == [(t.config, t.parent) for t in other]
    for trial in one:
        again = PLAN.sampler.propose(as_seen(one, trial.number), trial.attempt)
        assert (again, PLAN.part(as_seen(one, trial.number))) == (trial.config, Part(trial.parent, trial.until))
    study = study_of(PLAN)
    for _ in range(SIZE):
        study.ask()
    for number in range(SIZE - 1):
        study.tell(number, Result(values=(1.0,)))
    with pytest.raises(NotYet):
        study.ask()
    study.tell(SIZE - 1, Failure(reason="lost"))
    assert study.ask().number == SIZE


def test_the_worst_fifth_goes_on_from_the_best_with_another_rate_and_the_rest_from_itself() -> None:
    trials = searched(0).trials
    assert [trial.parent for trial in trials[:SIZE]] == [None] * SIZE
    worst, best = {0, 7}, {8, 9}  # of the first round
    for member, trial in enumerate(trials[SIZE : 2 * SIZE]):
        assert trial.parent is not None
        source = trials[trial.parent].config
        if member in worst:
            factor = trial.config[LEARNING_RATE] / source[LEARNING_RATE]
            assert trial.parent in best
            assert any(factor == pytest.approx(one) for one in FACTORS) or trial.config[LEARNING_RATE] in (1e-4, 1e-2)
            assert trial.config["lora"] == source["lora"]
        else:
            assert (trial.parent, trial.config) == (member, source)


def test_where_nobody_has_a_loss_the_population_begins_anew() -> None:
    lost = [
        Trial(number=n, config={}, candidate=Candidate("", 1.0, 1), told=0, outcome=Failure(reason="")) for n in (0, 1)
    ]
    population = Population(SPACE.parameters, 2)
    assert population.parent(lost) is None
    assert set(population.propose(lost, 0)) == {"lora", LEARNING_RATE}


def test_rates_come_to_those_that_train_well() -> None:
    """Each round takes a member nearer to 0 the nearer its rate is to 1e-3: exploit and explore find that rate."""
    plan = replace(PLAN, trials=20 * SIZE)
    study, losses = study_of(plan), dict[int, float]()
    while len(study.trials) < plan.trials:
        trial = study.ask()
        before = 1.0 if trial.parent is None else losses[trial.parent]
        losses[trial.number] = before * (0.8 + 0.05 * abs(_decades(trial.config)))
        study.tell(trial.number, Result(values=(losses[trial.number],)))

    def off(trials: tuple[Trial, ...]) -> float:
        return sum(abs(_decades(trial.config)) for trial in trials) / len(trials)

    assert off(study.trials[-SIZE:]) < 0.5 * off(study.trials[:SIZE])


def _decades(config: Config) -> float:
    from math import log10

    return log10(config[LEARNING_RATE]) + 3


def test_a_members_job_takes_its_rounds_steps_and_goes_on_from_its_parents_job() -> None:
    bridge = bridged(study_of(PLAN), replace(PLAN, concurrency=SIZE))
    first = [_spec(bridge.suggest(f"{number}")) for number in range(SIZE)]
    assert {one.rung for one in first} == {Rung(until=1 / 3)}
    assert bridge.suggest("early") is None, "Tune is to ask again"
    for number in range(SIZE):
        bridge.on_trial_complete(f"{number}", {"done": True, "loss": 1.0 + number, "job": f"ftjob-{number}"})
    assert _spec(bridge.suggest("again")).rung == Rung(until=2 / 3, after="ftjob-0")


def _spec(config: object) -> JobSpec:
    assert isinstance(config, dict)
    return read_request(config["body"]).to_spec()


@pytest.mark.parametrize(
    "change", [{"trials": 25}, {"trials": SIZE}, {"startup": 1}, {"seeds": 2}, {"pruner": "halving"}]
)
def test_a_population_that_has_no_rounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadPlan, match="pbt"):
        replace(PLAN, **change)  # type: ignore[arg-type]

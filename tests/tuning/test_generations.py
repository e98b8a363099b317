"""NOAH's evolution, and searches over the subnets of a supernet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polygraft.cluster.spec import read_request
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.elastic import cut
from polygraft.grafts.grammar import parse
from polygraft.tuning.plan import BadPlan
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.samplers.generations import Generations
from polygraft.tuning.space import LEARNING_RATE
from polygraft.tuning.spaces.parameters import check
from polygraft.tuning.spaces.supernets import nls, noah
from polygraft.tuning.study import NotYet, Result, Study, Trial
from tests.tuning.bridged import bridged
from tests.tuning.plans import plan_of
from tests.tuning.standin import SHAPE

SPACE = nls(SHAPE, ranks=(8, 4, 2, 1))


def generation(trials: list[Trial], sampler: Generations, count: int) -> None:
    """As many more trials, whose loss is the sum of their ranks' numbers."""
    for _ in range(count):
        config = sampler.propose(trials, 0)
        check(SPACE.parameters, config)
        loss = float(sum(value for name, value in config.items() if name != LEARNING_RATE))
        candidate = SPACE.candidate(config)
        outcome = Result(values=(loss,))
        trials.append(Trial(number=len(trials), config=config, candidate=candidate, told=0, outcome=outcome))


def test_generations_come_nearer_and_are_children_of_the_best() -> None:
    sampler, trials = Generations(SPACE.parameters, population=20, seed=1), list[Trial]()
    generation(trials, sampler, 120)
    losses = [trial.values[0] for trial in trials if trial.values]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 2 * np.std(losses[:20])
    best = [t.config for t in sorted(trials[:20], key=lambda t: (t.values or (0.0,), t.number))[:4]]
    names = [name for name in best[0] if name != LEARNING_RATE]
    for trial in trials[30:40]:  # crossover: all of two parents
        assert any(
            all(trial.config[name] in (one[name], other[name]) for name in names) for one in best for other in best
        )


def test_a_generation_waits_for_the_one_before() -> None:
    sampler, trials = Generations(SPACE.parameters, population=4), list[Trial]()
    generation(trials, sampler, 4)
    with pytest.raises(NotYet):
        sampler.propose([replace(trials[0], outcome=None), *trials[1:]], 0)
    generation(trials, sampler, 1)
    sampler.propose([*trials[:4], replace(trials[4], outcome=None)], 0)


def asked(**fields: object) -> SearchRequest:
    body = {"name": "net", "training_file": "file-1", "validation_file": "file-2", "sampler": "noah", "seeds": 2}
    return SearchRequest.model_validate({**body, "supernet": "net@3", **fields})


def test_a_trial_over_a_supernet_is_judged_as_it_lies_in_it_and_a_final_is_trained_by_itself() -> None:
    plan = asked(space={"kind": "noah", "sizes": [2, 4], "depths": 2}).plan(backbone="tiny", shape=SHAPE)
    study = Study(plan.space, plan.objectives, plan.sampler, part=plan.part)
    bridge = bridged(study, plan)
    config = bridge.suggest("a")
    peft, rate = study.trials[0].candidate.peft, study.trials[0].candidate.learning_rate
    assert isinstance(config, dict)
    spec = read_request(config["body"]).to_spec()
    assert spec.peft == f"{peft} + from(of=net@3)" and spec.rung is not None and spec.rung.until == 0
    again = read_request(plan.final_request(study="s", number=0, peft=peft, learning_rate=rate, seed=1)).to_spec()
    assert (again.peft, again.rung) == (peft, None)
    rates = {plan.space.candidate(plan.sampler.propose([], attempt)).learning_rate for attempt in range(5)}
    assert len(rates) == 1, "the rate is not searched"


def test_every_point_of_noahs_space_is_a_subnet_of_its_supernet() -> None:
    space = noah(SHAPE, sizes=(2, 4, 8), depths=3)
    text = "lora(r=8) + serial(8, at=ffn.out) + prefix(8) + elastic(sizes=2|4|8, groups=3)"
    supernet, found = BoundGraft(parse(text), SHAPE), 0
    sampler = Generations(space.parameters, population=50)
    for attempt in range(40):
        try:
            candidate = space.candidate(sampler.propose([], attempt))
        except ValueError:
            continue
        found += bool(cut(BoundGraft(parse(candidate.peft), SHAPE), supernet))
    assert found > 20


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"pruner": "halving"}, "pruner: the subnets"),
        ({"sampler": "pbt", "seeds": 0}, "sampler: pbt"),
        ({"space": {"kind": "s4", "most": 5000}}, "supernet: the points of s4"),
    ],
)
def test_a_search_over_a_supernet_that_makes_no_sense_is_refused(fields: dict[str, object], wrong: str) -> None:
    with pytest.raises(BadPlan, match=wrong):
        asked(**fields).plan(backbone="tiny", shape=SHAPE)
    assert plan_of().supernet is None

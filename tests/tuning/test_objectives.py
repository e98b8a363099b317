"""What is minimised and limited: by construction, before a trial, or by what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.scores import Scores
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import decode_bytes
from polygraft.grafts.grammar import parse
from polygraft.tuning.objectives import LOSS, PARAMETERS, Limit, known, limit
from polygraft.tuning.plan import BadPlan
from polygraft.tuning.study import Exhausted, Failure, Result, Study, Unmet
from tests.tuning.plans import invented, plan_of
from tests.tuning.standin import SHAPE

PLAN = plan_of()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"minimise": ("los",)}, "objectives: 'los' is unknown; choices: loss, parameters, bytes, decode_bytes"),
        ({"minimise": ()}, "objectives: none"),
        ({"minimise": ("parameters",)}, "objectives: nothing of them is measured"),
        ({"minimise": ("loss", "loss")}, "objectives: 'loss' is given twice"),
        ({"limits": (Limit("latency", 5.0),)}, "limits: 'latency' is unknown"),
        ({"limits": (Limit("bytes", float("nan")),)}, "limits.bytes: nan is not a number"),
        ({"limits": (limit("score", 1.5),), "minimise": ("score",)}, "limits.score: 1.5 is no score; give the least"),
        ({"limits": (limit("accuracy", 0.5),)}, "limits.accuracy: it is measured; give it as an objective, too"),
    ],
)
def test_an_objective_or_limit_that_there_is_not_is_refused_by_name(change: dict[str, object], wrong: str) -> None:
    with pytest.raises(BadPlan, match=wrong):
        replace(PLAN, **change)  # type: ignore[arg-type]


def test_what_is_known_of_a_graft_before_it_is_trained() -> None:
    """lora(2) at one projection of 64 x 64: 2 (64 + 64) numbers."""
    peft = "lora(2, at=attn.q)@0"
    assert known("parameters", peft, SHAPE) == 256
    assert known("bytes", peft, SHAPE) == 4 * 256
    read = 2 * (256 + 64 + 64 + 2 * 2)  # A and B, x and y, and what lies between them written and read
    assert known("decode_bytes", peft, SHAPE) == read


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("lora(2)", "lora(4)"),
        ("prefix(2)", "prefix(4)"),
        ("prompt(2)", "prompt(4)"),
        ("shira(1)", "shira(2)"),
        ("hra(2)", "hra(4)"),
        ("oft(4)", "oft(8)"),
        ("lora(2, at=attn.q)", "dora(2, at=attn.q)"),
        ("ia3@0", "ia3"),
        ("loha(4, at=attn.q)", "loha(4)"),
        ("molora(2, 2)", "molora(2, 4)"),
    ],
)
def test_a_larger_graft_moves_more_for_a_token(small: str, large: str) -> None:
    costs = [decode_bytes(BoundGraft(parse(peft), SHAPE), 2) for peft in (small, large)]
    assert 0 < costs[0] < costs[1]


def test_a_prefix_costs_its_keys_and_values_and_dora_what_its_lora_and_a_scale_do() -> None:
    kv = 2 * 2 * 16  # keys and values of two heads
    assert decode_bytes(BoundGraft(parse("prefix(3)"), SHAPE), 2) == 6 * 3 * kv * 2
    lora, dora = (decode_bytes(BoundGraft(parse(f"{m}(2, at=attn.q)@0"), SHAPE), 2) for m in ("lora", "dora"))
    assert dora - lora == 2 * 64 * 2 + 2 * 64 * 4


def test_candidates_above_a_known_limit_are_never_tried() -> None:
    plan = replace(plan_of(), limits=(Limit("decode_bytes", 20_000),))
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits)
    for _ in range(10):
        trial = study.ask()
        assert known("decode_bytes", trial.candidate.peft, SHAPE) <= 20_000
        study.tell(trial.number, invented(plan.space, trial))


def test_a_known_limit_that_nothing_meets_ends_the_search_with_the_nearest_miss() -> None:
    plan = replace(plan_of(), limits=(Limit("bytes", 3),))
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits)
    with pytest.raises(Unmet, match=r"proposals .* miss one; the nearest: .* bytes, not 3"):
        study.ask()
    assert study.trials == () and issubclass(Unmet, Exhausted)


def test_a_measured_limit_that_nobody_meets_ends_the_search_early_with_the_nearest_miss() -> None:
    plan = replace(plan_of(12), limits=(Limit("loss", 0.1),))
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits, hope=plan.hope)
    for number in range(6):
        study.tell(study.ask().number, Result(values=(2.0 - 0.1 * number, 10.0)))
    with pytest.raises(Unmet, match=r"none of 6 results is within 0\.1 loss; the nearest miss is trial 5, .*1\.5 loss"):
        study.ask()
    assert study.front == ()


def test_the_front_is_of_those_within_the_limits() -> None:
    study = Study(PLAN.space, (LOSS, PARAMETERS), PLAN.sampler, limits=(Limit("loss", 2.0),), hope=2)
    for loss, size in ((2.5, 1.0), (1.5, 20.0), (1.9, 10.0)):
        study.tell(study.ask().number, Result(values=(loss, size)))
    assert [trial.number for trial in study.front] == [2, 1]


def test_of_a_score_what_is_missing_is_minimised_and_the_least_is_limited() -> None:
    plan = replace(plan_of(), minimise=("accuracy", "parameters"), limits=(limit("accuracy", 0.75),))
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits, hope=4)
    for accuracy in (0.25, 0.8, None):
        trial = study.ask()
        scores = Scores(exact_match=0.1, accuracy=accuracy)
        values = plan.values(trial.candidate.peft, 2.0, scores)
        study.tell(trial.number, Result(values=values, loss=2.0, scores=scores))
    assert [trial.number for trial in study.front] == [1] and study.trials[1].values is not None
    assert study.trials[1].values[0] == pytest.approx(0.2) and plan.measured == "accuracy"
    lost = study.trials[2].outcome
    assert isinstance(lost, Failure) and lost.reason.startswith("objectives: the held-out examples tell no accuracy")
    assert "exact_match" in lost.reason


def test_a_score_that_nobody_reaches_is_told_as_people_know_it() -> None:
    plan = replace(plan_of(12), minimise=("score",), limits=(limit("score", 0.9),))
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits, hope=2)
    for score in (0.5, 0.75):
        study.tell(study.ask().number, Result(values=(1 - score,)))
    with pytest.raises(Unmet, match=r"none of 2 results is within 0\.9 score; the nearest miss is .*0\.75 score"):
        study.ask()


def test_several_objectives_at_once() -> None:
    plan = replace(plan_of(), minimise=("loss", "decode_bytes", "bytes"))
    study = Study(plan.space, plan.objectives, plan.sampler)
    for _ in range(6):
        trial = study.ask()
        values = plan.values(trial.candidate.peft, 2.0)
        assert values == (
            2.0,
            known("decode_bytes", trial.candidate.peft, SHAPE),
            known("bytes", trial.candidate.peft, SHAPE),
        )
        study.tell(trial.number, Result(values=values, loss=2.0))
    assert study.front

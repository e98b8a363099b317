"""What a new study takes over from earlier ones: of the same space, the nearest task first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import JsonValue

from polygraft.cluster.ground import Ground
from polygraft.tuning.desk import Desk
from polygraft.tuning.record import StudyRecord, decode, encode
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.samplers.first import First
from polygraft.tuning.spaces.parameters import Config
from polygraft.tuning.study import Result, Study
from polygraft.tuning.warm import Task, WarmStart, similarity, taken_over, task_of
from tests.tuning.plans import plan_of
from tests.tuning.standin import SHAPE


def lines(pairs: list[tuple[str, str]]) -> str:
    return "".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
        for q, a in pairs
    )


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    data = {
        "reviews": [
            (f"The film number {n} was long and the plot was thin", "bad" if n % 2 else "good") for n in range(40)
        ],
        "more reviews": [(f"I saw film {n} and the plot was good", "good" if n % 3 else "bad") for n in range(50)],
        "recipes": [(f"How do I cook dish {n}?", f"Chop {n} onions, fry them in oil. " * 20) for n in range(400)],
    }
    found = {}
    for name, pairs in data.items():
        (tmp_path / name).write_text(lines(pairs))
        found[name] = task_of(tmp_path / name)
    return found


def test_a_tasks_statistics_are_of_its_prompts_and_answers(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(lines([("ab cd", "yes"), ("ab", "yes"), ("x", "no")]))
    task = task_of(tmp_path / "data")
    assert task.examples == 3
    assert (task.prompt, task.answer, task.distinct) == pytest.approx((8 / 3, 8 / 3, 2 / 3))
    assert sum(task.words) == pytest.approx(1)
    (tmp_path / "table").write_text("ab cd\tyes\nab\tyes\n")
    assert (task_of(tmp_path / "table").prompt, task_of(tmp_path / "table").distinct) == (3.5, 0.5)
    (tmp_path / "rows").write_text('{"sentence": "ab cd", "label": "yes"}\n{"sentence": "ab", "label": "yes"}\n')
    assert (task_of(tmp_path / "rows").prompt, task_of(tmp_path / "rows").distinct) == (3.5, 0.5)


def test_like_tasks_are_nearer_than_unlike_ones(tasks: dict[str, Task]) -> None:
    reviews, more, recipes = tasks.values()
    assert similarity(reviews, reviews) == pytest.approx(1)
    assert similarity(reviews, more) == similarity(more, reviews) > similarity(reviews, recipes) + 0.2


def test_the_best_of_each_comes_before_the_second_best_the_nearest_task_first(tasks: dict[str, Task]) -> None:
    reviews, more, recipes = tasks.values()
    one, two, three, four, five = ({"x": n} for n in range(5))
    earlier: dict[str, tuple[Task | None, list[Config]]] = {
        "far": (recipes, [one, two]),
        "near": (more, [three, four, five]),
        "unknown": (None, [one]),
    }
    found = taken_over(reviews, earlier)
    assert found == WarmStart((three, one, four, two), ("near", "far"))
    assert taken_over(reviews, {}) == WarmStart()


PLAN = plan_of()
BODY: dict[str, JsonValue] = {
    "name": "new",
    "training_file": "file-1",
    "validation_file": "file-2",
    "space": {"kind": "autopeft", "groups": 3, "largest": 16, "longest": 8},
}


def record_of(loss: float, *, seed: int) -> str:
    """A study over the plan's space with three results, the second the best."""
    plan = replace(PLAN, seed=seed)
    study = Study(plan.space, plan.objectives, plan.sampler)
    for number in range(3):
        study.tell(study.ask().number, Result(values=(loss + abs(number - 1), 100.0 + number)))
    return encode(StudyRecord(plan=plan, trials=study.trials))


def begun(earlier: dict[str, str], **fields: JsonValue) -> StudyRecord:
    ground = Ground(backbone="tiny", shape=SHAPE, quantised=False, earlier=earlier)
    return decode(Desk().begin({**BODY, **fields}, ground)[1])


def test_the_first_trials_of_a_study_are_the_best_of_earlier_ones_over_its_space() -> None:
    other = encode(
        StudyRecord(
            plan=plan_of(
                space=SearchRequest.model_validate({**BODY, "space": {"kind": "nls"}})
                .plan(backbone="tiny", shape=SHAPE)
                .space
            )
        )
    )
    earlier = {"study-a": record_of(1.0, seed=1), "study-b": record_of(2.0, seed=2), "study-c": other, "study-d": "{}"}
    plan = begun(earlier, warm_start="auto").plan
    assert plan.warm.studies == ("study-a", "study-b")
    best = [decode(earlier[name]).trials[1].config for name in ("study-a", "study-b")]
    assert list(plan.warm.configs[:2]) == best
    assert isinstance(plan.sampler, First)
    study = Study(plan.space, plan.objectives, plan.sampler)
    asked = [study.ask().config for _ in range(len(plan.warm.configs) + 1)]
    assert asked[:-1] == list(plan.warm.configs) and asked[-1] not in plan.warm.configs
    assert begun(earlier).plan.warm == WarmStart()
    assert begun({}, warm_start="auto").plan.warm == WarmStart()


def test_a_study_to_start_from_that_has_nothing_over_the_space_is_refused() -> None:
    with pytest.raises(ValueError, match="warm_start: study-a has no results over this space"):
        begun({"study-a": record_of(1.0, seed=1)}, warm_start="study-a", space={"kind": "nls"})

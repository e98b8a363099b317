"""Searches replayed on a table: on curves that were made up, so that what comes out is known, and on the table that is
kept."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import optuna
import pytest
from peft_table import finals, show, studies
from peft_table import table as kept
from peft_table.arms import SETTINGS, Arm, Setting
from peft_table.finals import SEEDS, costs
from peft_table.measures import after_tokens, after_trials, best_was_stopped, chosen, hypervolume, saved, spent
from peft_table.replay import Nearest, Ran, View, place, replayed
from peft_table.studies import Studies, key
from peft_table.table import Table, drawn, space_of

from polygraft.tuning.objectives import LOSS, PARAMETERS
from polygraft.tuning.pruners.choose import PrunerName
from polygraft.tuning.pruners.halving import Halving
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.study import NotYet, Trial
from tests.tuning.standin import SHAPE

ROWS, STEPS = 16, 90


@pytest.fixture(scope="module")
def table() -> Table:
    """Row n ends at 1 + n / 10, after falling from 4 at the same pace as all others."""
    rows = drawn("autopeft", SHAPE, ROWS)
    level = 1 + np.arange(ROWS)[:, None, None, None] / 10
    fall = np.exp(-np.arange(1, STEPS + 1) / 20)
    training = np.broadcast_to(level + (4 - level) * fall, (ROWS, 1, 2, STEPS)).astype(np.float32)
    ends = np.broadcast_to(level, (ROWS, 1, 2, kept.LOOKS)).astype(np.float32)
    return Table(
        about="made up",
        shape=SHAPE,
        tasks=("none",),
        rows=rows,
        training=training,
        validation=ends,
        test=ends[..., 0],
        untrained=np.array([4.0], np.float32),
        tokens=np.array([100.0], np.float32),
    )


@pytest.fixture(scope="module")
def view(table: Table) -> View:
    return View(table, "autopeft", 0, 0)


def chance(view: View, seed: int = 0) -> Spread:
    return Spread(view.space.parameters, 1, seed)


def test_a_proposal_means_the_nearest_row_that_was_not_tried(view: View) -> None:
    class Insists:
        def propose(self, trials: object, attempt: int) -> object:
            return view.rows[3].config

    nearest = Nearest(Insists(), view)  # type: ignore[arg-type]
    first = nearest.propose((), 0)
    assert first == view.rows[3].config
    candidate = view.space.candidate(first)
    second = nearest.propose((Trial(number=0, config=first, candidate=candidate, told=0),), 0)
    distances = [float(np.square(view.points[3] - view.points[n]).sum()) for n in range(ROWS)]
    assert (
        view.rows.index(next(row for row in view.rows if row.config == second))
        == sorted(range(ROWS), key=lambda n: distances[n])[1]
    )


def test_distances_are_shares_of_ranges_and_one_where_choices_differ() -> None:
    parameters = space_of("s4", SHAPE).parameters
    one = {"grouping": 0, "spending": 1, "tuned_1": 1, "tuned_2": 0, "tuned_3": 0, "tuned_4": 0, "methods_1": 4}
    other = one | {"grouping": 3}
    less = {name: value for name, value in one.items() if name != "methods_1"} | {"tuned_1": 0}
    rate = {"learning_rate": 1e-3}
    at = place(parameters, one | rate)
    assert np.square(at - place(parameters, other | rate)).sum() == pytest.approx(1.0)
    assert np.square(at - place(parameters, one | {"learning_rate": 1e-2})).sum() == pytest.approx(1.0)
    assert np.square(at - place(parameters, less | rate)).sum() == pytest.approx(1.0 + 1.0 + 0.5)


def test_without_a_pruner_every_trial_costs_a_training_and_all_rows_have_no_regret(view: View) -> None:
    ran = replayed(view, chance(view), (LOSS, PARAMETERS), trials=ROWS)
    assert {one.row for one in ran} == set(range(ROWS)) and all(one.complete for one in ran)
    end = after_trials(view, ran, ROWS)
    assert (end.spent, end.regret) == (float(ROWS), 0.0) and end.volume == pytest.approx(1.0)
    assert saved(view, ran) == 0 and not best_was_stopped(view, ran) and chosen(view, ran) == 0


def test_what_is_spent_counts_trials_that_still_run(view: View) -> None:
    ran = [Ran(0, 0, 90, True), Ran(1, 0, 45, False), Ran(2, 45, 90, True)]
    assert [spent(view, ran, now) for now in (45, 90, 135)] == [1.0, 2.0, 2.5]
    assert saved(view, ran) == pytest.approx(1 - 225 / 270)


def test_the_first_trials_say_how_far_a_study_is_from_the_best(view: View) -> None:
    ran = [Ran(row, 90 * n, 90, True) for n, row in enumerate((7, 5, 9, 2))]
    assert [after_trials(view, ran, count).regret for count in (1, 2, 3, 4)] == pytest.approx([0.7, 0.5, 0.5, 0.2])
    after = after_tokens(view, ran, 3)
    assert after is not None and after.regret == pytest.approx(0.5)
    assert after_tokens(view, ran, 5) is None


def test_rungs_stop_trials_on_the_table_as_by_hand(view: View) -> None:
    """One after the other, each better than all before it but the last four: at a rung the best third goes on."""
    order = [9, 8, 7, 1, 10, 11, 12, 0]

    class InOrder:
        def propose(self, trials: list[Trial], attempt: int) -> object:
            return view.rows[order[len(trials)]].config

    ran = replayed(view, InOrder(), (LOSS,), trials=len(order), pruner=Halving(), concurrency=1)  # type: ignore[arg-type]
    assert [(one.row, one.steps) for one in ran] == [
        (9, 90), (8, 90), (7, 90), (1, 90), (10, 10), (11, 10), (12, 10), (0, 90)
    ]  # fmt: skip
    assert not best_was_stopped(view, ran)


def test_places_are_kept_while_a_sampler_waits_for_its_generation(view: View) -> None:
    class Generations:
        def propose(self, trials: tuple[Trial, ...], attempt: int) -> object:
            if len(trials) == 4 and any(trial.outcome is None for trial in trials):
                raise NotYet
            return view.rows[len(trials)].config

    ran = replayed(view, Generations(), (LOSS,), trials=8, concurrency=3)  # type: ignore[arg-type]
    assert {one.row: one.began for one in ran} == dict(enumerate([0, 0, 0, 90, 180, 180, 180, 270]))


def test_a_best_that_was_stopped_is_noticed(view: View) -> None:
    assert best_was_stopped(view, [Ran(0, 0, 10, False), Ran(3, 0, 90, True)])


def test_hypervolume_is_the_area_up_to_the_reference() -> None:
    points = np.array([[1.0, 3.0], [2.0, 1.0], [2.5, 2.0], [5.0, 0.0]])
    assert hypervolume(points, (4.0, 4.0)) == 3 * 1 + 2 * 2


@pytest.mark.parametrize(
    ("setting", "arm"),
    [
        pytest.param(s, a, marks=[pytest.mark.nightly] if "gp" in a.sampler else [], id=key(s, "", a))
        for s in (SETTINGS[0], SETTINGS[2])
        for a in s.arms
    ],
)
def test_every_arm_replays_the_same_again(view: View, setting: Setting, arm: Arm) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def once() -> tuple[Ran, ...]:
        sampler = arm.sampler_for(view, (LOSS, PARAMETERS), 12, seed=1)
        return replayed(view, sampler, (LOSS, PARAMETERS), trials=12, pruner=arm.pruner_for())

    assert once() == once()


def test_every_sampler_and_pruner_is_replayed_that_a_table_can_answer() -> None:
    replayed_ones = {(arm.sampler, arm.pruner) for setting in SETTINGS for arm in setting.arms}
    # BoTorch's is an extra, NOAH's asks for subnets of a supernet, and a population goes on from its members' weights.
    samplers = set(get_args(SamplerName)) - {"saas", "noah", "pbt"}
    assert {sampler for sampler, _ in replayed_ones if " " not in sampler} == samplers
    assert {pruner for _, pruner in replayed_ones} >= set(get_args(PrunerName))
    rivals = {f"optuna {name}" for name in ("random", "tpe", "gp", "nsga2")}
    assert {sampler for sampler, _ in replayed_ones} >= rivals and ("random", "optuna asha") in replayed_ones
    assert {arm.seeds for setting in SETTINGS for arm in setting.arms if arm.name in ("random", "tpe, none")} == {100}


def test_what_stopping_costs_is_the_difference_of_what_was_chosen_on_new_seeds(table: Table) -> None:
    setting = next(one for one in SETTINGS if one.name == "autopeft, stopping")
    plain, early = Arm("random"), Arm("random", "early-exit")
    studies: Studies = {
        key(setting, "none", plain): {"0": {"chosen": 0, "saved": 0.0}, "1": {"chosen": 1, "saved": 0.0}},
        key(setting, "none", early): {"0": {"chosen": 0, "saved": 0.6}, "1": {"chosen": 2, "saved": 0.8}},
    }
    finals = {"none": {f"{row}": [1.0 + row / 10] * len(SEEDS) for row in range(3)}}
    found = costs(table, studies, finals)[f"{setting.name} | {early.name}"]
    assert [found.saved, found.worse] == pytest.approx([0.7, 0.05]) and found.studies == 2
    assert found.at_most > found.worse and found.no_worse  # two studies prove nothing


def test_studies_go_on_where_they_were_left_and_make_a_page(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = (Arm("random", seeds=2), Arm("random", "early-exit", seeds=2))
    few = (
        Setting("autopeft", "autopeft", (LOSS, PARAMETERS), 12, arms[:1]),
        Setting("autopeft, stopping", "autopeft", (LOSS,), 12, arms),
        Setting("autopeft, stopping, by fronts", "autopeft", (LOSS, PARAMETERS), 12, arms[:1]),
    )
    for module in (studies, finals, show):
        monkeypatch.setattr(module, "SETTINGS", few)
    path = tmp_path / "studies.json"
    first = studies.measure(table, path, seconds=1e9, only="", seeds=1, say=print)
    assert {name: list(by) for name, by in first.items()} == {
        "autopeft | none | random": ["0"],
        "autopeft, stopping | none | random": ["0"],
        "autopeft, stopping | none | random, early-exit": ["0"],
        "autopeft, stopping, by fronts | none | random": ["0"],
    }
    both = studies.measure(table, path, seconds=1e9, only="", seeds=None, say=print)
    assert all(by["0"] == first[name]["0"] and list(by) == ["0", "1"] for name, by in both.items())
    tests = {"none": {f"{row}": [1.0 + row / 10] * len(SEEDS) for row in range(ROWS)}}
    page = show.write(table, both, tests, tmp_path).read_text()
    assert "| random, early-exit | 2 |" in page and "of the samples saved (goal at least 70%" in page
    (by_loss, by_fronts) = (line for line in page.splitlines() if "regret after 5 trainings" in line)
    assert "volume" not in by_loss and "| volume after 5 trainings | volume after 10 trainings |" in by_fronts
    volumes = _cells(page, by_fronts, "volume after 5 trainings")
    wanted = [one["tokens"][0][2] for one in both["autopeft, stopping, by fronts | none | random"].values()]  # type: ignore[index]
    assert volumes.startswith(f"{np.mean(wanted):.3f} ±")
    assert all((tmp_path / name).exists() for name in ("samplers.svg", "stopping.svg"))


def _cells(page: str, head: str, column: str) -> str:
    """What the first row under the head has in the column."""
    row = page[page.index(head) :].splitlines()[2]
    return row.split(" | ")[head.split(" | ").index(column)]


def test_a_table_is_read_as_it_was_written(table: Table, tmp_path: Path) -> None:
    kept.save(table, tmp_path)
    found = kept.load(tmp_path)
    assert (found.rows, found.shape, found.tasks, found.about) == (table.rows, SHAPE, ("none",), "made up")
    assert np.array_equal(found.training, table.training) and np.array_equal(found.test, table.test)


@pytest.mark.skipif(not (kept.HERE / "table.npz").exists(), reason="the table is not there")
def test_the_table_that_is_kept_means_what_its_spaces_say() -> None:
    found = kept.load()
    assert len({(row.space, row.peft, row.learning_rate) for row in found.rows}) == len(found.rows) >= 128
    assert found.training.shape == (len(found.rows), 2, 2, 48) and found.validation.shape[:3] == found.test.shape
    ended = np.isfinite(found.validation[..., -1])
    assert ended.mean() > 0.95 and np.isfinite(found.training[ended]).all(), "curves are whole"
    for row in found.rows:
        candidate = space_of(row.space, found.shape).candidate(row.config)
        assert (candidate.peft, candidate.learning_rate, candidate.parameters) == (
            row.peft,
            row.learning_rate,
            row.parameters,
        )

"""The report of a search: a page that needs nothing else, a table, and the command that trains a trial again."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest

from polygraft.cluster.scores import Scores
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.tuning.desk import axes, read, shown
from polygraft.tuning.finals import Interval, Member
from polygraft.tuning.report.optuna_study import export
from polygraft.tuning.report.page import page
from polygraft.tuning.report.summary import Report, as_csv, by_layer, history, importances, saved, submit_line
from polygraft.tuning.space import Candidate
from polygraft.tuning.study import Failure, Result, Stopped, Study, Trial, pareto
from tests.tuning.plans import invented, plan_of
from tests.tuning.standin import SHAPE

PLAN = plan_of()


def report_of(trials: int) -> Report:
    study = Study(PLAN.space, PLAN.objectives, PLAN.sampler)
    for number in range(trials):
        trial = study.ask()
        outcome = invented(PLAN.space, trial)
        match number % 6:
            case 4:
                study.tell(number, Failure(reason="loss is <nan>"))
            case 5:
                study.tell(number, Stopped(reason="behind", step=2, steps_total=8, loss=2.9))
            case _:
                scores = Scores(exact_match=number / 16)
                study.tell(number, replace(outcome, loss=outcome.values[0], scores=scores))
    job = PLAN.job.model_dump(mode="json", exclude_unset=True)
    front = tuple(trial.number for trial in study.front)
    found = Member(front[0], 100, 1.5, 0.1, 3, Interval(0.5, 0.0), Interval(1.625, 0.25), Interval(0.4375, 0.125))
    return Report(
        name="find <it>",
        id="study-1",
        status="succeeded",
        objectives=("loss", "parameters"),
        trials=study.trials,
        front=front,
        finals=(found,),
        chosen=front[0],
        job=job,
    )


@pytest.mark.parametrize("objectives", [("loss", "parameters"), ("loss",)], ids=len)
def test_optuna_reads_the_study_from_its_own_storage(objectives: tuple[str, ...], tmp_path: Path) -> None:
    report = report_of(12)
    if len(objectives) == 1:
        alone = [replace(t, outcome=Result(values=t.values[:1])) if t.values else t for t in report.trials]
        report = replace(report, objectives=objectives, trials=tuple(alone))
    told = tuple(read(json.loads(json.dumps(shown(trial)))) for trial in report.trials)  # as a client has them
    for _ in range(2):  # the second time in place of the first
        export(replace(report, trials=told), axes([asdict(one) for one in PLAN.space.parameters]), tmp_path / "s.db")
    study = optuna.load_study(study_name="study-1", storage=f"sqlite:///{tmp_path / 's.db'}")
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 's.db'}")) == 1
    assert study.metric_names == list(objectives) and study.user_attrs == {"name": "find <it>"}
    assert [trial.params for trial in study.trials] == [trial.config for trial in report.trials]
    found = {trial.number: tuple(trial.values) for trial in study.trials if trial.values}
    assert found == {trial.number: trial.values for trial in report.trials if trial.values}
    assert {trial.number for trial in study.best_trials} == {trial.number for trial in pareto(report.trials)}
    stopped = study.trials[5]
    assert stopped.user_attrs["reason"] == "behind"
    assert stopped.state.name == ("PRUNED" if len(objectives) == 1 else "FAIL")
    assert study.trials[0].user_attrs["graft"] == report.trials[0].candidate.peft


def test_the_page_has_its_pictures_in_it_and_asks_for_nothing() -> None:
    text = page(report_of(12), SHAPE)
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 5
    assert not re.search(r'(src|href)="(?!data:)', text)
    for word in (
        "find &lt;it&gt;",
        "loss is &lt;nan&gt;",
        "1.5000 ± 0.1000",
        "2 stopped",
        "0.188",
        "of the steps saved",
    ):
        assert word in text
    assert "<nan>" not in text


def test_the_last_columns_of_what_was_chosen_are_the_test_files() -> None:
    text = page(report_of(12), SHAPE)
    (row,) = re.findall(r'<tr class="chosen"><td(?:(?!</tr>).)*1\.5000 ± 0\.1000.*?</tr>', text)
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row)[-2:] == ["1.6250 ± 0.2500", "0.4375 ± 0.1250"]
    assert "<th>graft</th><th>test loss</th><th>test score</th>" in text


def test_a_page_without_results_says_what_there_is() -> None:
    empty = replace(report_of(6), trials=(), front=(), finals=(), chosen=None, note="limits: nothing meets them")
    text = page(empty, SHAPE)
    assert "limits: nothing meets them" in text and "<img" not in text


def test_the_table_has_a_line_a_trial_with_every_parameter() -> None:
    report = report_of(12)
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [int(row["trial"]) for row in rows] == list(range(12))
    assert {parameter.name for parameter in PLAN.space.parameters} <= rows[0].keys()
    assert [int(row["trial"]) for row in rows if row["front"] == "1"] == sorted(report.front)
    assert rows[4]["loss"] == "" and rows[4]["reason"] == "loss is <nan>"


def test_a_trial_is_trained_again_by_one_line() -> None:
    report = report_of(2)
    words = shlex.split(submit_line(report.trials[0], report.trials, report.job))
    assert words[:3] == ["polygraft", "submit", "file-1"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    what = report.trials[0].candidate
    assert flags == {
        "--peft": what.peft,
        "--learning-rate": f"{what.learning_rate:g}",
        "--n-epochs": "2",
        "--batch-size": "4",
        "--validation-file": "file-2",
    }
    first, member = report.trials[0], replace(report.trials[1], parent=0, until=0.5)
    first = replace(first, outcome=Result(values=(1.0, 2.0), job="ftjob-7"))
    assert submit_line(member, (first, member), report.job).endswith(" --until 0.5 --after ftjob-7")


def test_what_every_layer_got_sums_up_to_the_graft() -> None:
    peft = "lora(2, at=attn.q)@1-2 + prefix(3)@2"
    counts = by_layer(peft, SHAPE)
    assert counts == (0, 256, 256 + 2 * 3 * 32, 0, 0, 0)
    assert sum(counts) == BoundGraft(parse(peft), SHAPE).parameters


def trial_of(number: int, loss: float | None, **config: float) -> Trial:
    outcome = None if loss is None else Result(values=(loss,), loss=loss)
    return Trial(number=number, config=config, candidate=Candidate("lora", 1e-3, 1), told=0, outcome=outcome)


def test_the_best_so_far_falls() -> None:
    trials = [trial_of(0, 2.0), trial_of(1, None), trial_of(2, 3.0), trial_of(3, 1.0)]
    assert history(trials) == ((0, 2.0), (3, 1.0))


def test_importance_is_the_squared_rank_correlation() -> None:
    trials = [trial_of(n, float(n), up=n**3, down=-n, mixed=(n * 7) % 5, same=1.0) for n in range(5)]
    found = importances(trials)
    assert found["up"] == pytest.approx(1.0) and found["down"] == pytest.approx(1.0)
    assert 0 <= found["mixed"] < 0.9 and "same" not in found


def test_the_share_of_saved_steps() -> None:
    assert saved(report_of(12).trials) == pytest.approx(2 * 6 / (8 * (2 + 8)))
    assert saved(report_of(3).trials) is None

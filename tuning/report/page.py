"""A search as one HTML file with its pictures in it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from polygraft.grafts.sites import ModelShape
from polygraft.tuning.finals import Interval
from polygraft.tuning.front import draw
from polygraft.tuning.report import pictures
from polygraft.tuning.report.summary import Report, saved, submit_line
from polygraft.tuning.study import Failure, Stopped, Trial, TrialState

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1f2933;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem}.soft{color:#697586}img{max-width:100%}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e6eaee;text-align:left}td.n{text-align:right}
.chosen{background:#e7f4f2}code{font-size:.85rem;overflow-wrap:anywhere}section{margin-top:2.2rem}
"""


def page(report: Report, shape: ModelShape | None = None) -> str:
    """The whole page; what each layer got needs the backbone's shape."""
    done = [trial for trial in report.trials if trial.loss is not None]
    parts = [f"<h1>{escape(report.name)}</h1>", f'<p class="soft">{escape(_about(report))}</p>']
    if report.note:
        parts.append(f"<p>{escape(report.note)}</p>")
    if done:
        parts.append(_section("Loss over size", _picture(lambda path: _front(report, path))))
        parts.append(_section("What was chosen", _finals(report)))
        parts.append(_section("The best so far", _image(pictures.history(report))))
        parts.append(_section("Every trial", _image(pictures.parallel(report))))
        parts.append(_section("What mattered", _image(pictures.importance(report)) + _CAUTION))
        if shape is not None:
            parts.append(_section("What each layer got", _image(pictures.layers(report, shape))))
    parts.append(_section("Trials", _table(report)))
    parts.append(_section("To train one again", _submits(report)))
    body = "\n".join(parts)
    title = escape(report.name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>'


_CAUTION = (
    '<p class="soft">Squared rank correlation of each parameter with the loss; what they do together is not in it.</p>'
)


_TESTED = (
    '<p class="soft">One was chosen by what the validation file says. The last two columns are of the test file, which '
    "neither the search nor the choice has seen; they are empty where none was given.</p>"
)


def _about(report: Report) -> str:
    states = [trial.state for trial in report.trials]
    said = [f"{report.id}, {report.status}", f"{len(states)} trials"]
    said += [f"{states.count(state)} {state.value}" for state in TrialState if states.count(state)]
    share = saved(report.trials)
    if share is not None:
        said.append(f"{share:.0%} of the steps saved by early stops")
    return " · ".join(said)


def _finals(report: Report) -> str:
    if not report.finals:
        return '<p class="soft">No member of the front was trained again; give <code>seeds</code>.</p>'
    rows = []
    for member in report.finals:
        trial = report.trials[member.trial]
        loss = _interval(Interval(member.loss, member.half_width))
        cells = [f"{member.trial}", loss, _interval(member.score), _validation(trial), f"{member.parameters:,}"]
        cells += [f"{member.seeds}"]
        tested = "".join(f'<td class="n">{_interval(one)}</td>' for one in (member.test_loss, member.test_score))
        mark = ' class="chosen"' if member.trial == report.chosen else ""
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr{mark}>{numbers}<td>{escape(trial.candidate.peft)}</td>{tested}</tr>")
    again = ("trial", "loss again, 95%", "score", "loss in the search", "parameters", "seeds", "graft")
    return _rows((*again, "test loss", "test score"), rows) + _TESTED


def _interval(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.4f}" + (f" ± {found.half_width:.4f}" if found.half_width else "")


def _validation(trial: Trial) -> str:
    return "" if trial.loss is None else f"{trial.loss:.4f}"


def _table(report: Report) -> str:
    rows = []
    for trial in report.trials:
        outcome = trial.outcome
        reason = outcome.reason if isinstance(outcome, Failure | Stopped) else ""
        what = trial.candidate
        score = "" if trial.scores.score is None else f"{trial.scores.score:.3f}"
        numbers = [f"{trial.number}", _validation(trial), score, f"{what.parameters:,}", f"{what.learning_rate:g}"]
        cells = "".join(f'<td class="n">{one}</td>' for one in numbers)
        cells += "".join(f"<td>{escape(one)}</td>" for one in (trial.state.value, what.peft, reason))
        rows.append(f"<tr{' class=chosen' * (trial.number in report.front)}>{cells}</tr>")
    return _rows(("trial", "loss", "score", "parameters", "learning rate", "state", "graft", "why"), rows)


def _rows(names: Sequence[str], rows: Sequence[str]) -> str:
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"


def _submits(report: Report) -> str:
    lines = (submit_line(report.trials[number], report.trials, report.job) for number in report.front)
    return "".join(f"<p><code>{escape(line)}</code></p>" for line in lines)


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _front(report: Report, path: Path) -> None:
    front = [report.trials[number] for number in report.front]
    draw(report.trials, path, front=front or None, title="Which graft for which budget")


def _picture(make: Callable[[Path], None]) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        make(path)
        return _inline(path.read_bytes())


def _image(figure: Figure) -> str:
    data = BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return _inline(data.getvalue())


def _inline(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{b64encode(png).decode()}">'

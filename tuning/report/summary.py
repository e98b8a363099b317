"""What a report says of a search, from its trials alone: plain values, and tables as CSV."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from polygraft.cluster.scores import SCORES
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape
from polygraft.tuning.finals import Member
from polygraft.tuning.study import Failure, Stopped, Trial, TrialState


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A search and what came of it; `front` and `chosen` are numbers of trials, `job` what every trial trains."""

    name: str
    id: str
    status: str
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    finals: tuple[Member, ...] = ()
    chosen: int | None = None
    note: str | None = None
    job: Mapping[str, JsonValue]


def history(trials: Sequence[Trial]) -> tuple[tuple[int, float], ...]:
    """(trial, the lowest loss so far) whenever it fell, by number."""
    found: list[tuple[int, float]] = []
    for trial in trials:
        if trial.loss is not None and (not found or trial.loss < found[-1][1]):
            found.append((trial.number, trial.loss))
    return tuple(found)


def importances(trials: Sequence[Trial]) -> dict[str, float]:
    """What share of the trials' differences in loss each parameter explains by its rank alone: Spearman's correlation,
    squared, over the trials that have the parameter; the largest first. Parameters of fewer than 4 trials are left out.

    A coarse measure, which says nothing of what parameters do together.
    """
    import numpy as np
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    found: dict[str, float] = {}
    for name in sorted({name for trial in trials for name in trial.config}):
        pairs = [(t.config[name], t.loss) for t in trials if t.loss is not None and name in t.config]
        if len(pairs) >= 4 and len({x for x, _ in pairs}) > 1 and len({y for _, y in pairs}) > 1:
            found[name] = float(np.square(spearmanr(*zip(*pairs, strict=True)).statistic))
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def by_layer(peft: str, shape: ModelShape) -> tuple[int, ...]:
    """Trainable parameters that every layer of the backbone got; what layers share counts in none."""
    counts = [0] * shape.layers
    for tensor in BoundGraft(parse(peft), shape).trained:
        if tensor.site is not None:
            counts[tensor.site.layer] += tensor.numel
    return tuple(counts)


def saved(trials: Sequence[Trial]) -> float | None:
    """The share of all trials' steps that was not trained because some were stopped; None if none was."""
    stopped = [trial.outcome for trial in trials if isinstance(trial.outcome, Stopped)]
    if not stopped:
        return None
    whole = stopped[0].steps_total
    ended = sum(trial.state is TrialState.COMPLETE for trial in trials)
    return sum(one.steps_total - one.step for one in stopped) / (whole * (len(stopped) + ended))


def submit_line(trial: Trial, trials: Sequence[Trial], job: Mapping[str, JsonValue]) -> str:
    """The command that trains a trial's graft again, for a member of a population by the same part of its steps; the
    files are ids of the service, of which `jobs` knows the names."""
    method = _inner(job, "method")
    kind = str(method.get("type", "supervised"))
    given = _inner(_inner(method, kind), "hyperparameters")
    flags = [("--peft", trial.candidate.peft), ("--learning-rate", f"{trial.candidate.learning_rate:g}")]
    flags += [(f"--{name.replace('_', '-')}", str(value)) for name, value in sorted(given.items())]
    flags += [("--validation-file", str(job.get("validation_file")))]
    flags += [("--type", kind)] if kind != "supervised" else []
    if trial.until not in (0.0, 1.0):
        flags.append(("--until", f"{trial.until}"))
    if trial.parent is not None and (source := trials[trial.parent].outcome) is not None:
        flags.append(("--after", f"{source.job}"))
    words = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags)
    return f"polygraft submit {job.get('training_file')} {words}"


def as_csv(report: Report) -> str:
    """A line a trial: number, state, loss, the scores that there are, parameters, learning rate, graft, whether it is
    on the front, why it has no loss, and every parameter of the space."""
    scores = [name for name in SCORES if any(name in trial.scores.told for trial in report.trials)]
    names = sorted({name for trial in report.trials for name in trial.config})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["trial", "state", "loss", *scores, "parameters", "learning_rate", "peft", "front", "reason"]
    writer.writerow([*head, *names])
    for trial in report.trials:
        what, outcome = trial.candidate, trial.outcome
        reason = outcome.reason if isinstance(outcome, Failure | Stopped) else ""
        facts = [trial.number, trial.state.value, "" if trial.loss is None else trial.loss]
        facts += [trial.scores.told.get(name, "") for name in scores]
        facts += [what.parameters, what.learning_rate, what.peft, int(trial.number in report.front), reason]
        writer.writerow([*facts, *(trial.config.get(name, "") for name in names)])
    return text.getvalue()


def _inner(value: Mapping[str, JsonValue], name: str) -> Mapping[str, JsonValue]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}

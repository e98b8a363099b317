"""A search as a person sees it: a bar for each running trial and a line for each that has ended."""

from __future__ import annotations

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from polygraft.launch.output import errors
from polygraft.tuning.study import Failure, Result, Stopped, Trial, TrialState


class SearchProgress:
    """Give `on_trial` every trial when it is asked for and when it ends, inside the context."""

    def __init__(self, trials: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=errors,
        )
        self._all = self._progress.add_task(f"{trials} trials", total=trials)
        self._bars: dict[int, TaskID] = {}

    def __enter__(self) -> SearchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_trial(self, trial: Trial) -> None:
        if trial.state is TrialState.RUNNING:
            description = f"  #{trial.number} {escape(trial.candidate.peft)}"
            self._bars[trial.number] = self._progress.add_task(description, total=None)
            return
        if (bar := self._bars.pop(trial.number, None)) is not None:
            self._progress.remove_task(bar)
        self._progress.advance(self._all)
        self.say(f"  #{trial.number:<2} {_told(trial)}")

    def say(self, line: str) -> None:
        self._progress.console.print(escape(line), highlight=False, soft_wrap=True)


def _told(trial: Trial) -> str:
    graft = f"{trial.candidate.peft}, learning rate {trial.candidate.learning_rate:g}"
    match trial.outcome:
        case Result():
            score = "" if trial.scores.score is None else f"  score {trial.scores.score:.3f}"
            return f"loss {trial.loss:.4f}{score}  {trial.candidate.parameters:>9,} parameters  {graft}"
        case Failure(reason=reason):
            return f"failed: {reason}  ({graft})"
        case Stopped(reason=reason, step=step, steps_total=steps_total):
            return f"stopped at step {step} of {steps_total}: {reason}  ({graft})"
        case None:
            return f"was cut short  ({graft})"

"""The curves of one search while its trials run, and what its pruner says at their looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polygraft.tuning.pruners.curves import Curve, Pruner, means, traits
from polygraft.tuning.study import Result, Stopped, Trial


class Watch:
    """Fed with the losses of running trials, by step; a restarted one is fed from the beginning and decides the same
    but for trials that others have overtaken meanwhile."""

    def __init__(self, pruner: Pruner, trials: Sequence[Trial], known: Mapping[str, tuple[float, ...]]) -> None:
        """`known` objectives by the union of a trial; trials that have ended bring their curves."""
        self._pruner = pruner
        self._known = dict(known)
        self._losses: dict[int, dict[int, float]] = {}
        self._curves: dict[int, Curve] = {}
        for trial in trials:
            self.ended(trial)

    def curve(self, trial: int) -> tuple[float, ...]:
        found = self._curves.get(trial)
        return () if found is None else found.losses

    def ended(self, trial: Trial) -> None:
        """Keep the curve of a trial that has been told."""
        outcome = trial.outcome
        self._losses.pop(trial.number, None)
        if isinstance(outcome, Result | Stopped) and outcome.curve:
            known = self._known.get(trial.candidate.peft, ())
            self._curves[trial.number] = Curve(outcome.curve, known, traits(trial.candidate), trial.loss)
        else:
            self._curves.pop(trial.number, None)

    def judge(
        self, trial: Trial, known: tuple[float, ...], losses: Mapping[int, float], steps_total: int
    ) -> Stopped | None:
        """What becomes of a running trial, given its losses since it was judged last: None if it goes on."""
        self._known[trial.candidate.peft] = known
        own = self._losses.setdefault(trial.number, {})
        own.update(losses)
        looks = self._pruner.looks(trial.number, steps_total)
        reached = means(own, looks)
        before = len(self.curve(trial.number))
        for count in range(before + 1, len(reached) + 1):
            self._curves[trial.number] = Curve(reached[:count], known, traits(trial.candidate))
            if count == len(looks):
                break  # it has trained to its end
            if reason := self._pruner.reason_to_stop(self._curves, trial.number):
                return Stopped(
                    reason=reason,
                    step=looks[count - 1],
                    steps_total=steps_total,
                    loss=reached[count - 1],
                    curve=reached[:count],
                )
        return None

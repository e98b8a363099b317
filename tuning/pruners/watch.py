"""The curves of one search while its trials run, and what its pruner says at their looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
        self._judged: dict[int, int] = {}  # at how many looks, of running trials
        for trial in trials:
            self.ended(trial)

    def curve(self, trial: int) -> tuple[float, ...]:
        found = self._curves.get(trial)
        return () if found is None else found.losses

    def due(self, trial: int, step: int, steps_total: int) -> bool:
        """Whether a trial that has come to this step has passed a look at which it was not judged yet."""
        return sum(look <= step for look in self._pruner.looks(trial, steps_total)) > self._judged.get(trial, 0)

    def ended(self, trial: Trial) -> None:
        """Keep the curve of a trial that has been told."""
        outcome = trial.outcome
        self._losses.pop(trial.number, None)
        self._judged.pop(trial.number, None)
        if isinstance(outcome, Result | Stopped) and outcome.curve:
            known = self._known.get(trial.candidate.peft, ())
            self._curves[trial.number] = Curve(outcome.curve, known, traits(trial.candidate), trial.loss)
        else:
            self._curves.pop(trial.number, None)

    def see(self, trial: Trial, known: tuple[float, ...], losses: Mapping[int, float], steps_total: int) -> None:
        """Keep the losses of a running trial since they were told last, for it and for those that are judged by it."""
        self._known[trial.candidate.peft] = known
        own = self._losses.setdefault(trial.number, {})
        own.update(losses)
        reached = means(own, self._pruner.looks(trial.number, steps_total))
        self._curves[trial.number] = Curve(reached, known, traits(trial.candidate))

    def judge(self, trial: Trial, steps_total: int) -> Stopped | None:
        """What becomes of a running trial, at the looks at which it was not judged yet, beside what was seen of the
        others: None if it goes on."""
        looks = self._pruner.looks(trial.number, steps_total)
        seen = self._curves[trial.number]
        for count in range(self._judged.get(trial.number, 0) + 1, len(seen.losses) + 1):
            self._judged[trial.number] = count
            if count == len(looks):
                break  # it has trained to its end
            own = replace(seen, losses=seen.losses[:count])
            if reason := self._pruner.reason_to_stop({**self._curves, trial.number: own}, trial.number):
                self._curves[trial.number] = own
                return Stopped(
                    reason=reason,
                    step=looks[count - 1],
                    steps_total=steps_total,
                    loss=own.losses[-1],
                    curve=own.losses,
                )
        return None

"""Asynchronous successive halving and Hyperband (Li et al. 2020, arXiv 1810.05934, algorithm 2; Li et al. 2018, arXiv
1603.06560).

A trial that comes to a rung goes on if it is among the best 1/eta of those that have come there, and is stopped
otherwise, so that nobody waits for the slow; those that come together are judged beside one another. Hyperband's
brackets differ in their first rung; trials take turns in them. It departs from the papers in that a trial is never
resumed (a pack has let its rows go), and that trials are ranked by fronts where graft size counts, too: one that is
worse but smaller than all others is on the front, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polygraft.tuning.pruners.curves import Curve, ranked

ETA = 3
RUNGS = 2  # below the end: after 1/9 and 1/3 of the steps


@dataclass(frozen=True, slots=True)
class Halving:
    """With `brackets` of more than 1 it is Hyperband: the trials of bracket b pass the first b rungs unjudged."""

    eta: int = ETA
    rungs: int = RUNGS
    brackets: int = 1

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        found = (-(-steps_total // self.eta**rung) for rung in range(self.rungs, 0, -1))
        return (*dict.fromkeys(step for step in found if step < steps_total), steps_total)

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        rung = len(curves[trial].losses)
        bracket = trial % self.brackets
        if curves[trial].finished or rung <= bracket:
            return None
        peers = {
            number: (curve.losses[rung - 1], *curve.known)
            for number, curve in curves.items()
            if number % self.brackets == bracket and len(curve.losses) >= rung
        }
        place, kept = ranked(peers).index(trial), len(peers) // self.eta
        if len(peers) < self.eta or place < kept:
            return None
        return f"number {place + 1} of {len(peers)} at rung {rung}, of which {kept} go on"

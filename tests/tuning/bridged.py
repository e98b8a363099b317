"""Tune's side of a driver, without Tune."""

from __future__ import annotations

from polygraft.tuning.ahead import Ahead, Begin, OnTrial
from polygraft.tuning.bridge import StudySearcher
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.study import Study


def bridged(
    study: Study,
    plan: SearchPlan,
    on_trial: OnTrial = lambda trial: None,
    begin: Begin = lambda number, body: f"ftjob-{number}",
) -> StudySearcher:
    """As a driver makes it."""
    return StudySearcher(Ahead("study-1", study, plan, on_trial, begin), plan, on_trial)

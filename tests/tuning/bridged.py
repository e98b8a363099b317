"""Tune's side of a driver, without Tune."""

from __future__ import annotations

import itertools

from polygraft.tuning.ahead import Ahead, Begin, OnTrial
from polygraft.tuning.bridge import StudySearcher
from polygraft.tuning.driver import stops_of
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.stops import Jobs
from polygraft.tuning.study import Study


def bridged(
    study: Study,
    plan: SearchPlan,
    on_trial: OnTrial = lambda trial: None,
    begin: Begin = lambda number, body: f"ftjob-{number}",
    jobs: Jobs | None = None,
) -> StudySearcher:
    """As a driver makes it, which asks `jobs` how far they are where a pruner may stop them; it may look at any
    time."""
    stops = None if jobs is None else stops_of(plan, study, jobs, itertools.count(step=60).__next__)
    return StudySearcher(Ahead("study-1", study, plan, on_trial, begin), plan, on_trial, stops)

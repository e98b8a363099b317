"""What of an error is a job's own fault, and how its tenant is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from polygraft.cluster.store.base import StoreError
from polygraft.grafts.runtime.process import allocation_failed, unfit
from polygraft.trainers.ranks import RankLost

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that cannot go on, by its own fault; the others do."""

    job: str
    code: str
    message: str


def shared(error: BaseException) -> bool:
    """Whether what raised it is everybody's, the store, the other ranks or the process: no job fails for its loss."""
    return isinstance(error, StoreError | RankLost) or unfit(error)


def failure(job: str, doing: str, error: Exception, code: str = "step_failed") -> Failed:
    """What a job is told whose part of the pack's work, `doing`, raised. Raises `error` where it is no job's."""
    if shared(error):
        raise error
    if allocation_failed(error):
        return Failed(job, "out_of_memory", f"{doing}: memory is too short for it")
    _LOG.warning("job %s: %s", job, doing, exc_info=error)
    return Failed(job, code, f"{doing}: {type(error).__name__}: {error}")

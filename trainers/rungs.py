"""What a job that ends at a rung leaves: all that decides its future, for jobs of any pack that go on from there.

It lies in a folder of its own, which appears whole before the job is published, and for a day after.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import torch

from polygraft.cluster.folders import Folders
from polygraft.trainers import checkpoint
from polygraft.trainers.job import TrainJob
from polygraft.trainers.running import RunningJob

KEPT_S = 86400.0


class RungGone(ValueError):
    """The state that a job is to go on from is not there."""


def keep(folders: Folders, running: RunningJob, *, device_class: str) -> None:
    """Write the state of a job at its rung, and forget what others left more than a day ago."""
    checkpoint.save(folders.rung(running.job.id), running, device_class=device_class)
    for old in folders.rungs.iterdir():
        if old.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(old, ignore_errors=True)


def go_on(folders: Folders, job: TrainJob, after: str, device: torch.device | str = "cpu") -> RunningJob:
    """The job with the state that `after` left at its rung. Raises RungGone."""
    folder = folders.rung(after)
    name = checkpoint.newest(folder)
    if name is None:
        raise RungGone(f"rung.after: the state of {after} is gone, it is kept for a day; train it again")
    source = replace(job, id=after)
    try:
        return checkpoint.load(folder, name, source, device).forked(job)
    except checkpoint.CheckpointError as error:
        raise RungGone(f"rung.after: the state of {after} cannot be read: {error}") from None

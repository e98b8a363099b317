"""When the jobs of a pack are expected to end."""

from __future__ import annotations

from dataclasses import replace

from polygraft.grafts.runtime.slab import Slab
from polygraft.trainers.pace import Paces
from polygraft.trainers.running import RunningJob
from tests.killed_writers import JOB, LORA

FIVE = replace(JOB, config=replace(JOB.config, epochs=5))  # steps


def test_a_job_is_expected_to_end_after_its_other_steps_at_the_pace_of_the_last() -> None:
    now = [0.0]
    paces = Paces(lambda: now[0])
    running = {"ftjob-1": RunningJob(FIVE, Slab(LORA))}
    paces.began("ftjob-1")
    assert paces.left_s(running) == {} and not paces.ending(running, 60.0), "nobody knows before its first step"
    now[0] = 3.0
    paces.stepped("ftjob-1")
    running["ftjob-1"].step = 1
    left_s = 3.0 * 4
    assert paces.left_s(running) == {"ftjob-1": left_s}
    assert paces.ending(running, left_s + 0.1) == {"ftjob-1"} and not paces.ending(running, left_s)
    running["ftjob-1"].step = 5
    assert not paces.ending(running, 60.0), "it waits to be published, maybe for room on the disk"

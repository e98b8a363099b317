"""What a pack's worker tells of its jobs while they train: metrics, progress and lines of their log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from polygraft.cluster.advance import record_progress
from polygraft.cluster.model import JobId, Pace, PackId
from polygraft.cluster.scores import UNSCORED, Judged
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Fence, Store, Write
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.running import RunningJob, Stepped

METRICS_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Reports:
    """Raises StoreError, Fenced among them where another worker has the pack."""

    store: Store
    fence: Fence

    def metrics(self, stepped: Stepped) -> None:
        entry = {
            "step": stepped.step,
            "loss": stepped.loss,
            "lr": stepped.learning_rate,
            "grad_norm": stepped.norm,
            "tokens": stepped.tokens,
            "skipped": stepped.skipped,
            "at": time.time(),
        }
        self.store.append(keys.metrics(JobId(stepped.job)), entry, maxlen=METRICS_KEPT)

    def progress(self, running: RunningJob, after: Judgement | None = None, tested: Judgement | None = None) -> None:
        before = running.before
        record_progress(
            self.store,
            JobId(running.job.id),
            step=running.step,
            trained_tokens=running.tokens,
            loss_before=before.loss if before else None,
            loss_after=after.loss if after else None,
            judged=Judged(
                before=before.scores if before else UNSCORED,
                after=after.scores if after else UNSCORED,
                test_loss=tested.loss if tested else None,
                test=tested.scores if tested else UNSCORED,
            ),
            fence=self.fence,
        )

    def pace(self, pack: PackId, left_s: Mapping[str, float]) -> None:
        """In how many seconds the pack's jobs are expected to end."""
        pace = Pace(id=pack, at=time.time(), left_s={JobId(job): left for job, left in left_s.items()})
        self.store.commit([Write(keys.pace(pack), pace, None)], fence=self.fence)

    def note(
        self,
        job: JobId,
        message: str,
        *,
        level: str = "info",
        held_out: Judgement | None = None,
        tested: Judgement | None = None,
    ) -> None:
        data: dict[str, JSON] = {}
        if held_out is not None:
            data |= {"held_out_loss": held_out.loss, "scores": dict(held_out.scores.told)}
        if tested is not None:
            data |= {"test_loss": tested.loss, "test_scores": dict(tested.scores.told)}
        self.store.append(keys.log(job), {"level": level, "message": message, "at": time.time(), "data": data})

"""Stage 2: an AutoPEFT-style search on one topic, every trial a job in the pack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.client import Client
from polygraft.cluster.model import TenantId
from polygraft.cluster.service import Service
from polygraft.cluster.spec import read_request
from polygraft.launch import searching
from polygraft.launch.corpus import Share
from polygraft.launch.front import Point
from polygraft.launch.search_progress import SearchProgress
from polygraft.tuning.front import draw
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.space import Rates
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.study import Trial, pareto

TRIALS, CONCURRENCY, STARTUP = 12, 4, 4
_INFORMED = 6  # trials that must have been asked for after results were told
_LARGEST_ADAPTER, _LONGEST_PREFIX, _LAYER_GROUPS = 32, 16, 6
_LEARNING_RATES = Rates(5e-4, 1e-2)
_EXAMPLES = 32  # of the topic's training share: a low fidelity, the same for all trials
_TRAINING: dict[str, JsonValue] = {"n_epochs": 1, "batch_size": 8, "max_length": 64}


@dataclass(frozen=True, slots=True)
class Searched:
    """All trials, and where the front was drawn."""

    trials: tuple[Trial, ...]
    wall_s: float
    chart: Path

    @property
    def points(self) -> list[Point]:
        return [Point.of(trial) for trial in self.trials if trial.values is not None]

    @property
    def front(self) -> list[Point]:
        """From the smallest graft up."""
        return [Point.of(trial) for trial in pareto(self.trials)]

    @property
    def informed(self) -> int:
        """Trials that were asked for when results were known."""
        return sum(trial.told > 0 for trial in self.trials)

    def broken(self) -> Iterator[str]:
        """What the search promised and did not keep, as sentences."""
        if len(self.points) < TRIALS:
            yield f"{len(self.points)} of {TRIALS} trials finished"
        if self.informed < _INFORMED:
            yield f"{self.informed} trials were asked for after a result was known; at least {_INFORMED} are promised"

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "trials": len(self.points),
            "informed": self.informed,
            "wall_s": round(self.wall_s, 2),
            "chart": str(self.chart),
            "front": [point.to_json() for point in self.front],
            "points": [point.to_json() for point in self.points],
        }

    def draw(self) -> None:
        """Raises ValueError when no trial has finished."""
        draw(self.trials, self.chart, title="Serial x parallel x prefix x layers x learning rate")


def search(
    service: Service, share: Share, *, key: str, tenant: TenantId, folder: Path, progress: SearchProgress
) -> tuple[Trial, ...]:
    """All trials, once they have ended. Raises what `tuning.driver.search` and the client raise."""
    few = replace(share, train=share.train[:_EXAMPLES])
    with Client(service.url, key) as client:
        job = read_request(
            {
                "model": service.backbone,
                "training_file": client.upload(few.train_jsonl, filename=f"{share.name}.jsonl").id,
                "validation_file": client.upload(share.held_out_jsonl, filename=f"{share.name}-held-out.jsonl").id,
                "method": {"type": "supervised", "supervised": {"hyperparameters": _TRAINING}},
            }
        )
    space = autopeft(
        searching.shape_of(service.backbone_folder),
        groups=_LAYER_GROUPS,
        largest=_LARGEST_ADAPTER,
        longest=_LONGEST_PREFIX,
        learning_rate=_LEARNING_RATES,
    )
    plan = SearchPlan(name=share.name, space=space, job=job, trials=TRIALS, concurrency=CONCURRENCY, startup=STARTUP)
    return searching.run(
        service,
        plan,
        key=key,
        tenant=tenant,
        folder=folder,
        on_trial=progress.on_trial,
        on_progress=progress.on_progress,
    ).trials

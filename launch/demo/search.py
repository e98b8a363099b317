"""Stage 2: a search on one topic through the service. Every trial is a job in the pack, those that fall behind are
stopped, members of the front are trained again, and the search's name means the one that is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster import searches as remote
from polygraft.cluster.client import Client
from polygraft.cluster.searches import RemoteSearch
from polygraft.cluster.service import Service
from polygraft.launch.corpus import Share
from polygraft.launch.front import Point
from polygraft.launch.searching import followed, trials_of
from polygraft.tuning.front import draw
from polygraft.tuning.study import Stopped, Trial, TrialState

TRIALS, CONCURRENCY = 12, 4
_INFORMED = 6  # trials that must have been asked for after something was told
_EXAMPLES = 32  # of the topic's training share: a low fidelity, the same for all trials
ASKED: dict[str, JsonValue] = {
    "trials": TRIALS,
    "concurrency": CONCURRENCY,
    "startup": 4,
    "pruner": "halving",
    "seeds": 1,
    "choose": "knee",
    "promote": True,
    "space": {"kind": "autopeft", "groups": 6, "largest": 32, "longest": 16, "learning_rate": [5e-4, 1e-2]},
    "hyperparameters": {"n_epochs": 1, "batch_size": 4, "max_length": 64},
}


@dataclass(frozen=True, slots=True)
class Searched:
    """The search when it was over, all its trials, and where the front was drawn."""

    search: RemoteSearch
    trials: tuple[Trial, ...]
    wall_s: float
    chart: Path

    @property
    def points(self) -> list[Point]:
        return [Point.of(trial) for trial in self.trials if trial.values is not None]

    @property
    def front(self) -> list[Point]:
        """From the smallest graft up."""
        return [Point.of(self.trials[number]) for number in self.search.front]

    @property
    def stopped(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state is TrialState.STOPPED]

    @property
    def saved(self) -> float:
        """The share of all trials' steps that were not taken."""
        left = (
            1 - one.outcome.step / one.outcome.steps_total for one in self.trials if isinstance(one.outcome, Stopped)
        )
        return sum(left) / max(1, len(self.trials))

    @property
    def informed(self) -> int:
        """Trials that were asked for when something was told of others."""
        return sum(bool(trial.seen) for trial in self.trials)

    def broken(self) -> Iterator[str]:
        """What the search promised and did not keep, as sentences."""
        told = len(self.points) + len(self.stopped)
        if self.search.status != "succeeded" or told < TRIALS:
            note = f": {self.search.note}" if self.search.note else ""
            yield f"the search {self.search.status}, {told} of {TRIALS} trials finished or were stopped{note}"
        if self.informed < _INFORMED:
            yield f"{self.informed} trials were asked for after another one was told; at least {_INFORMED} are promised"
        if not self.stopped:
            yield "no trial was stopped"
        if self.search.chosen is None:
            yield "no member of the front was trained again and chosen"

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "trials": len(self.points),
            "stopped": len(self.stopped),
            "steps_saved": round(self.saved, 4),
            "informed": self.informed,
            "wall_s": round(self.wall_s, 2),
            "chart": str(self.chart),
            "front": [point.to_json() for point in self.front],
            "points": [point.to_json() for point in self.points],
            "finals": [member.model_dump(mode="json") for member in self.search.finals],
            "chosen": self.search.chosen,
        }

    def draw(self) -> None:
        """Raises ValueError when no trial has finished."""
        front = [self.trials[number] for number in self.search.front]
        draw(self.trials, self.chart, front=front, title="Serial x parallel x prefix x layers x learning rate")


def search(service: Service, share: Share, *, key: str) -> tuple[RemoteSearch, tuple[Trial, ...]]:
    """The search once it is over, and its trials. Raises what the client raises."""
    few = replace(share, train=share.train[:_EXAMPLES])
    with Client(service.url, key) as client:
        body: dict[str, JsonValue] = {
            "name": share.name,
            "training_file": client.upload(few.train_jsonl, filename=f"{share.name}.jsonl").id,
            "validation_file": client.upload(share.held_out_jsonl, filename=f"{share.name}-held-out.jsonl").id,
            **ASKED,
        }
        found = followed(client, remote.create(client, body))
        return found, tuple(trials_of(client, found))

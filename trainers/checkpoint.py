"""A job's checkpoint: all that decides its future, at a step boundary, in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from polygraft.cluster.scores import Scores
from polygraft.grafts.formats.tensor_file import write_tensors
from polygraft.grafts.runtime.slab import Slab
from polygraft.kernels.common.atomic import remove_drafts, whole_folder
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.job import TrainJob
from polygraft.trainers.running import CARRIED, RunningJob

SCHEMA = 1
_KEPT = 2
_TENSORS = ("master", "exp_avg", "exp_avg_sq")
_FROZEN = "frozen."  # before the names of tensors that are not trained


class CheckpointError(ValueError):
    """A checkpoint that does not belong to the job, or cannot be read."""


def save(folder: Path, running: RunningJob, named: str | None = None, *, device_class: str | None = None) -> str:
    """Write `checkpoint-<step>` under the job's folder and return its name; the newest two are kept, and the one that
    the manifest on disk has `named`, which need not be among them after a crash. It says which class of device has
    computed its last step.

    Micro-batches collected since the last step are not in it: they are computed again, with the same result.
    """
    name = f"checkpoint-{running.step:08d}"
    if (folder / name).exists():
        return name
    parts = {part: getattr(running.slab, part) for part in _TENSORS}
    frozen = {f"{_FROZEN}{name}": value for name, value in running.slab.frozen.items()}
    spec = json.loads(running.job.graft.spec.to_json())
    state = {"schema": SCHEMA, "job": running.job.id, "spec": spec, "device_class": device_class}
    if (before := running.before) is not None:
        state |= {"loss_before": before.loss, "scores_before": dict(before.scores.told)}
    remove_drafts(folder / name)  # of a worker that was killed here: a job is in one pack, which has one worker
    with whole_folder(folder / name) as draft:
        write_tensors({name: value.cpu() for name, value in (parts | frozen).items()}, draft / "slab.safetensors")
        (draft / "state.json").write_text(json.dumps(state | {key: getattr(running, key) for key in CARRIED}))
    for old in sorted(folder.glob("checkpoint-*"))[:-_KEPT]:
        if old.name != named:
            shutil.rmtree(old, ignore_errors=True)
    return name


def step_of(name: str | None) -> int:
    """After which step the checkpoint of this name was written; 0 for none."""
    return int(name.rpartition("-")[2]) if name else 0


def newest(folder: Path) -> str | None:
    """Name of the job's latest checkpoint, None when it has none."""
    return max((path.name for path in folder.glob("checkpoint-*")), default=None)


def before(folder: Path, name: str) -> str | None:
    """Name of the newest of the job's checkpoints that are older than `name`, None when it has none."""
    return max((path.name for path in folder.glob("checkpoint-*") if path.name < name), default=None)


def load(folder: Path, name: str, job: TrainJob, device: torch.device | str = "cpu") -> RunningJob:
    """The job as it was, on a device. Raises CheckpointError if the checkpoint is another job's or another graft's."""
    state = _state(folder, name)
    try:
        values = load_file(folder / name / "slab.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    if state["schema"] != SCHEMA or state["job"] != job.id or state["spec"] != json.loads(job.graft.spec.to_json()):
        raise CheckpointError(
            f"{name}: of job {state['job']}, schema {state['schema']}; expected {job.id}, schema {SCHEMA}"
        )
    slab = Slab(job.graft, values["master"].dtype, device)
    for part in _TENSORS:
        getattr(slab, part).copy_(values[part])
    for tensor, value in slab.frozen.items():
        value.copy_(values[f"{_FROZEN}{tensor}"])
    loss, scores = state.get("loss_before"), Scores(**state.get("scores_before", {}))
    before = None if loss is None else Judgement(loss, scores)
    facts = {key: state[key] for key in CARRIED}
    return RunningJob(job, slab, before=before, device_class=state.get("device_class"), **facts)


def _state(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / name / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    return found

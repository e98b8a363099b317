"""Whether the training arms compute the same: first-step losses and gradients of the pack against PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from child import Reply, answer, task
from material import Material
from peft_models import adapt, load, name
from record import Check, Gate
from torch import Tensor
from training_jobs import backbone_of, loss_of, pack

from polygraft.grafts.runtime.backbone import best_dtype
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import module_path
from polygraft.trainers.job import permutation
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_backward

EXACT = 1e-4  # float32: losses and gradients, relative
ROUNDED = 2e-2  # bf16: losses, relative; eight bits of mantissa through thirty layers
AS_GOOD = 1.5  # bf16: a gradient's distance from float32 PEFT's, as a multiple of bf16 PEFT's own
MATTERS = 5 * ROUNDED  # what a graft at least changes of its loss: well over what the gate forgives
_ROOT = "base_model.model.model."  # PEFT's name of the decoder

Gradients = Mapping[str, Tensor]


def check(folder: str, jobs: tuple[int, ...]) -> Gate:
    """Float32 first, then the dtype that is timed. Gradients are those of the first job."""
    material = Material.read(folder)
    true, slopes, bare = by_peft(material, "float32", jobs)
    losses, gradients = by_pack(material, torch.float32, jobs)
    checks = [
        Check("float32 losses, relative to PEFT", _apart(losses, true), EXACT),
        Check("float32 gradients, rel-L2 to PEFT", _distance(gradients, slopes), EXACT),
        Check("what the grafts change of the losses", _nearest(true, bare), MATTERS, least=True),
    ]
    if best_dtype() != torch.float32:
        timed = str(best_dtype()).removeprefix("torch.")
        theirs, coarse, _ = by_peft(material, timed, jobs)
        losses, gradients = by_pack(material, best_dtype(), jobs)
        limit = AS_GOOD * _distance(coarse, slopes)
        checks += [
            Check(f"{timed} losses, relative to PEFT in {timed}", _apart(losses, theirs), ROUNDED),
            Check(f"{timed} losses, relative to PEFT in float32", _apart(losses, true), ROUNDED),
            Check(f"{timed} gradients, rel-L2 to PEFT in float32", _distance(gradients, slopes), limit),
        ]
    return Gate(tuple(checks))


def by_pack(material: Material, dtype: torch.dtype, jobs: tuple[int, ...]) -> tuple[list[float], Gradients]:
    """Losses of the pack's first step, and the first job's gradient as PEFT would name and shape it."""
    backbone = backbone_of(material, dtype)
    runner = pack(backbone, material, jobs)
    first = runner.jobs[str(jobs[0])]
    stacks = backbone.stacks([Resident(first.job.id, first.job.graft, first.slab.tensors)], trainable=True)
    number = first.job.batch(0)[0]
    sample = first.job.train[number]
    forward_backward(backbone, stacks, [MicroBatch(0, 0, (sample,), (number,), sample.weight)])
    names = {
        tensor.name: f"{module_path(tensor.site, backbone.shape)}.lora_{tensor.part}"
        for tensor in first.job.graft.tensors
        if tensor.site is not None
    }
    gradients: dict[str, Tensor] = {}
    for piece in stacks.views[0]:
        found = piece.gradient()
        assert found is not None
        gradients[names[piece.tensor.name]] = (found.T if piece.tensor.part == "B" else found).float().clone()
    stepped = {done.job: done.loss for done in runner.step().stepped}
    return [stepped[str(job)] for job in jobs], gradients


def by_peft(material: Material, variant: str, jobs: tuple[int, ...]) -> tuple[list[float], Gradients, list[float]]:
    """Losses of every job's first sample, the first job's gradient, and the losses without any graft."""
    model = adapt(load(material, variant), material, jobs, trainable=True)
    samples = {job: material.samples[job][_first(job, len(material.samples[job]))] for job in jobs}
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for job, ids in samples.items():
        model.set_adapter(name(job))
        loss = loss_of(model, ids)
        losses.append(float(loss.detach()))
        if not gradients:
            torch.autograd.backward(loss)
            for key, value in model.named_parameters():
                if value.grad is not None:
                    module, _, part = key.partition(".lora_")
                    gradients[f"{module.removeprefix(_ROOT)}.lora_{part[0]}"] = value.grad.float().clone()
    with torch.inference_mode(), model.disable_adapter():
        bare = [float(loss_of(model, ids)) for ids in samples.values()]
    return losses, gradients, bare


def _first(job: int, count: int) -> int:
    """The number of the sample that the pack's job of that seed begins with."""
    return permutation(count, seed=job, epoch=0)[0]


def _apart(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _nearest(found: list[float], expected: list[float]) -> float:
    return min(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _distance(found: Gradients, expected: Gradients) -> float:
    """rel-L2 over all tensors together."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    error = sum(float((found[key] - expected[key]).square().sum()) for key in expected)
    return float((error / sum(float(value.square().sum()) for value in expected.values())) ** 0.5)


if __name__ == "__main__":

    def _check() -> Reply:
        return asdict(check(task().folder, task().jobs))

    torch.set_num_threads(task().threads)
    answer({"check": _check})

"""The training work as our pack and as PEFT take it: the same grafts, samples and hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from material import Material
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.cluster.settings import PackSettings
from polygraft.grafts.formats import native
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob

LEARNING_RATE = 1e-4
_NEVER_OVER = 10_000  # epochs


def backbone_of(material: Material, dtype: torch.dtype) -> Backbone:
    """Loaded as the pack's worker loads it."""
    return Backbone.load(Path(material.backbone), dtype, training=True)


def pack(backbone: Backbone, material: Material, jobs: Sequence[int]) -> PackRunner:
    """A pack as the service opens one, with the material's grafts as the starting values of its jobs."""
    runner = PackRunner(backbone, max_rows=PackSettings().max_rows)
    for number in jobs:
        stored = native.load(material.graft_folder(number), shape=backbone.shape, backbone=backbone.fingerprint)
        config = TrainConfig(
            epochs=_NEVER_OVER,
            batch_size=1,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            max_grad_norm=0.0,
            seed=number,
            micro_rows=PackSettings().micro_rows,
        )
        job = TrainJob(str(number), stored.graft, config, tuple(map(_sample, material.samples[number])))
        slab = Slab(job.graft)
        slab.fill(stored.tensors)
        runner.restore(RunningJob(job, slab))
    return runner


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """transformers' default optimiser, with the pack's hyper-parameters."""
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(chosen, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def loss_of(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Mean loss of predicting all ids after the first."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits[0].float(), tokens[0, 1:])


def _sample(ids: tuple[int, ...]) -> Sample:
    return Sample(ids, (0.0,) + (1.0,) * (len(ids) - 1))

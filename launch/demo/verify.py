"""`demo --verify`: train every job of the demo again, alone, in float32, by PEFT or by the method's own equation, and
compare.

The independent model gets the job's starting tensors and batches, and none of our arithmetic: transformers' Llama,
torch's AdamW and clipping, one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.jsonl import read
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.launch.corpus import Share
from polygraft.launch.demo.oracle.plain import Oracle
from polygraft.launch.demo.oracle.solo import solo
from polygraft.launch.demo.plan import SEED, DemoJob
from polygraft.trainers.job import Sample, TrainConfig, TrainJob

TOLERANCE = 0.01  # of the held-out loss


@dataclass(frozen=True, slots=True)
class Verified:
    """One job's held-out loss after training, packed by us and alone by the independent model."""

    label: str
    packed: float
    alone: float

    @property
    def difference(self) -> float:
        return abs(self.packed - self.alone) / self.alone

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE


def verify(
    folder: Path, jobs: Sequence[tuple[DemoJob, Share, float]], *, on_step: Callable[[str, int, int], None]
) -> tuple[Verified, ...]:
    """`folder` holds the backbone; each job comes with its tenant's data and the held-out loss that the pack
    reached."""
    backbone, tokeniser = Backbone.load(folder), Tokeniser.load(folder)
    prepared = [(plan, _job(plan, backbone.shape, share, tokeniser), packed) for plan, share, packed in jobs]
    starts = [
        initialise(job.graft, backbone, seed=SEED, samples=[sample.ids for sample in job.train])
        for _, job, _ in prepared
    ]
    del backbone
    return tuple(
        Verified(plan.label, packed, _trained_alone(folder, plan, job, start, on_step))
        for (plan, job, packed), start in zip(prepared, starts, strict=True)
    )


def _job(plan: DemoJob, shape: ModelShape, share: Share, tokeniser: Tokeniser) -> TrainJob:
    def samples(jsonl: bytes) -> tuple[Sample, ...]:
        encoded = (tokeniser.encode_example(example, plan.max_length) for example in read(jsonl))
        return tuple(Sample(tokens.ids, tokens.weights) for tokens in encoded)

    config = TrainConfig(
        epochs=plan.n_epochs,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        schedule=plan.schedule,
        seed=SEED,
    )
    graft = BoundGraft(parse(plan.peft), shape)
    return TrainJob(plan.label, graft, config, samples(share.train_jsonl), samples(share.held_out_jsonl))


def _trained_alone(
    folder: Path,
    plan: DemoJob,
    job: TrainJob,
    start: Mapping[str, Tensor],
    on_step: Callable[[str, int, int], None],
) -> float:
    model = solo(plan.peft, folder, start)
    leaves = list({id(place.parameter): place.parameter for place in model.places.values()}.values())
    optimiser = torch.optim.AdamW(leaves, lr=plan.learning_rate, weight_decay=job.config.weight_decay)
    for step in range(job.steps_total):
        optimiser.param_groups[0]["lr"] = job.learning_rate(step)
        optimiser.zero_grad()
        for number in job.batch(step):
            torch.autograd.backward(_loss(model, job.train[number]) / job.batch_weight(step))
        torch.nn.utils.clip_grad_norm_(leaves, job.config.max_grad_norm)
        optimiser.step()
        on_step(plan.label, step + 1, job.steps_total)
    with torch.no_grad():
        total = sum(float(_loss(model, sample)) for sample in job.held_out)
    return total / sum(sample.weight for sample in job.held_out)


def _loss(model: Oracle, sample: Sample) -> Tensor:
    """Weighted sum of the sample's token losses."""
    logits = model.logits(torch.tensor(sample.ids[:-1]))
    losses = F.cross_entropy(logits.float(), torch.tensor(sample.ids[1:]), reduction="none")
    return (losses * torch.tensor(sample.weights[1:])).sum()

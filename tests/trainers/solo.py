"""A job trained by torch's own AdamW on an oracle: another model, another loop, its arithmetic written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.launch.demo.oracle.plain import Oracle
from polygraft.trainers.job import TrainJob


def trained(  # noqa: PLR0913
    oracle: Oracle,
    job: TrainJob,
    *,
    rate: Callable[[str], float] = lambda name: 1.0,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    gradient: Callable[[], None] = lambda: None,
    after_step: Callable[[int], None] = lambda step: None,
    anew: int = 0,
) -> dict[str, Tensor]:
    """The trained tensors by our names; `rate` is a factor on a tensor's learning rate, `penalty` is added to the
    loss of every global batch, `gradient` may change what a backward left, `after_step` runs when the parameters have
    moved; at step `anew` another optimiser takes over, and another schedule."""
    config = job.config
    groups = [
        {"params": [place.parameter], "factor": rate(name.rpartition(".")[2])} for name, place in oracle.places.items()
    ]

    def optimiser_of(steps: int) -> tuple[torch.optim.AdamW, TrainJob]:
        """And a job of as many steps, for its schedule."""
        decay, betas = config.weight_decay, config.betas
        alike = replace(job, train=job.train[:1], config=replace(config, batch_size=1, epochs=steps))
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, weight_decay=decay), alike

    for step in range(job.steps_total):
        if step in (0, anew):
            began, (optimiser, alike) = step, optimiser_of((anew if step < anew else job.steps_total) - step)
        optimiser.zero_grad()
        loss = torch.as_tensor(penalty(), dtype=torch.float64)
        for number in job.batch(step):
            sample = job.train[number]
            logits = oracle.logits(torch.tensor(sample.ids[:-1]))
            losses = F.cross_entropy(logits, torch.tensor(sample.ids[1:]), reduction="none")
            loss = loss + (losses * torch.tensor(sample.weights[1:])).sum() / job.batch_weight(step)
        loss.backward()
        gradient()
        torch.nn.utils.clip_grad_norm_([place.parameter for place in oracle.places.values()], config.max_grad_norm)
        for group in optimiser.param_groups:
            group["lr"] = alike.learning_rate(step - began) * group["factor"]
        optimiser.step()
        after_step(step)
    return {name: place.view(place.parameter).detach().clone() for name, place in oracle.places.items()}

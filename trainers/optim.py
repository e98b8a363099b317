"""One job's optimiser step on its slab: clip by its own norm, then AdamW (Loshchilov & Hutter 2019) in float32; or
plain SGD for jobs whose gradient is estimated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polygraft.grafts.runtime.slab import Slab
from polygraft.trainers.job import TrainConfig


def grad_norm(slab: Slab) -> float:
    """L2 norm of the job's whole gradient; inf or nan when any part is. Here the host waits for the device."""
    return float(torch.linalg.vector_norm(_collected(slab)).cpu())


def adamw(
    slab: Slab, config: TrainConfig, *, step: int, learning_rate: float, norm: float, rates: Sequence[float] = ()
) -> None:
    """Update the master weights with the collected gradient; `step` counts from 0 since the moments were.

    `rates` are factors on the learning rate, one a trained tensor; none: all 1.
    """
    grad = _collected(slab)
    if config.max_grad_norm and norm > config.max_grad_norm:
        grad.mul_(config.max_grad_norm / (norm + 1e-6))
    for factor in sorted(set(rates)) if rates else (1.0,):

        def chosen(flat: Tensor, factor: float = factor) -> list[Tensor]:
            if not rates:
                return [flat]
            return [part for part, rate in zip(slab.split(flat), rates, strict=True) if rate == factor]

        torch._fused_adamw_(
            chosen(slab.master),
            chosen(grad),
            chosen(slab.exp_avg),
            chosen(slab.exp_avg_sq),
            [],
            [torch.tensor(float(step + 1), device=grad.device) for _ in chosen(grad)],
            lr=learning_rate * factor,
            beta1=config.betas[0],
            beta2=config.betas[1],
            weight_decay=config.weight_decay,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )


def sgd(slab: Slab, config: TrainConfig, *, learning_rate: float, rates: Sequence[float] = ()) -> None:
    """master -= rate (gradient + weight_decay master), without momentum or clipping."""
    grads = slab.split(_collected(slab))
    for weight, grad, factor in zip(slab.split(slab.master), grads, rates or (1.0,) * len(grads), strict=True):
        weight.add_(grad.add(weight, alpha=config.weight_decay), alpha=-learning_rate * factor)


def _collected(slab: Slab) -> Tensor:
    assert slab.grad is not None, "an optimiser step without a collected gradient"
    return slab.grad

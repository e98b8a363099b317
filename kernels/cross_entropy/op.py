"""The cross_entropy op: -log softmax(logits)[target] of every row, and its gradient in place of the logits.

A frozen head's gradient is wanted as soon as its logits are there, so that they need not be kept. A row is a function
of itself alone: neither other rows nor the number of threads has a part in its bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from polygraft.kernels.compiled.calls import DTYPES, Function, computes, function, structure

_SOURCE = Path(__file__).with_name("cross_entropy.cpp")
_SLOPE = structure("Slope", pointers="logits targets factors losses", integers="rows width dtype threads")
_SLICE = 32  # rows that torch's way has in float32 at a time


def replace_by_slope(logits_NV: Tensor, targets_N: Tensor, factors_N: Tensor, cap: float | None = None) -> Tensor:
    """Semantics: losses[n] = -log softmax(bent(logits[n]))[targets[n]], with bent(x) = cap tanh(x / cap), or x without
    a `cap`; the logits become factors[n] d losses[n] / d logits[n], rounded once to their dtype.

    Logits [N, V] contiguous, targets [N] int64 below V, factors [N] float32 or wider; losses [N] in float32 or wider,
    in which all is computed. A row with a logit that is not finite has a loss and a slope that are not.
    """
    compiled = None if cap is not None or factors_N.dtype != torch.float32 else _compiled(logits_NV)
    if compiled is None:
        parts = zip(*(torch.split(x, _SLICE) for x in (logits_NV, targets_N, factors_N)), strict=True)
        losses = [_steps(logits, targets, factors, cap) for logits, targets, factors in parts]
        return torch.cat(losses) if losses else factors_N.new_zeros(0)
    found = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    compiled.ready(
        logits=logits_NV,
        targets=targets_N.contiguous(),
        factors=factors_N.contiguous(),
        losses=found,
        rows=len(logits_NV),
        width=logits_NV.shape[1],
        dtype=DTYPES[logits_NV.dtype],
        threads=torch.get_num_threads(),
    )()
    return found


def _steps(logits_NV: Tensor, targets_N: Tensor, factors_N: Tensor, cap: float | None) -> Tensor:
    logs = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    bend = None
    if cap is not None:
        bend = logs.div_(cap).tanh_().clone()
        logs.mul_(cap)
    torch._log_softmax(logs, 1, False, out=logs)
    losses = -logs.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    slope = logs.exp_()
    slope.scatter_add_(1, targets_N.unsqueeze(1), slope.new_full((len(targets_N), 1), -1.0))
    if bend is not None:
        slope.mul_(1 - bend.square_())
    logits_NV.copy_(slope.mul_(factors_N.unsqueeze(1)))
    return losses


def _compiled(logits_NV: Tensor) -> Function | None:
    return function(_SOURCE, "cross_entropy", _SLOPE) if logits_NV.is_contiguous() and computes(logits_NV) else None

"""Grafts made of grafts: averaged, or summed with found weights.

Members have one spec, so that their tensors are the same but for their values. Of what was trained there is a sum; the
rest, such as random bases, indices and masks, gives it its meaning, and must be the same in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.spec import SpecError

Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Hub:
    """A weighted sum of grafts, and the few-shot loss that chose it, without its penalty."""

    weights: tuple[float, ...]
    tensors: Mapping[str, Tensor]
    loss: float


def combined(layout: Sequence[TensorSpec], members: Sequence[Values], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i theta_i, trained tensor by tensor of the `layout`, summed in float64, beside what the members share.

    Raises SpecError for members that differ in a tensor that is not trained.
    """
    if not members or len(members) != len(weights):
        raise SpecError(f"weights: {len(weights)} for {len(members)} grafts; give one each")
    if any(member.keys() != {tensor.name for tensor in layout} for member in members):
        raise SpecError("members: grafts with different tensors have no sum; give grafts of one spec")
    found: dict[str, Tensor] = {}
    for tensor in layout:
        values = [member[tensor.name] for member in members]
        if tensor.trained:
            terms = [w * value.double() for w, value in zip(weights, values, strict=True)]
            found[tensor.name] = torch.stack(terms).sum(0).to(values[0])
        elif all(value.equal(values[0]) for value in values):
            found[tensor.name] = values[0]
        else:
            raise SpecError(
                f"members: {tensor.name} is not trained and differs between them; give grafts that share it"
            )
    return found


def soup(layout: Sequence[TensorSpec], members: Sequence[Values]) -> dict[str, Tensor]:
    """AdapterSoup: the mean of the members' trained tensors (Chronopoulou et al. 2023, arXiv 2302.07027, eq. 1)."""
    return combined(layout, members, [1 / max(1, len(members))] * len(members))


def lorahub(
    layout: Sequence[TensorSpec],
    members: Sequence[Values],
    loss: Callable[[Values], float],
    *,
    steps: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
) -> Hub:
    """LoRAHub: (sum_i w_i A_i)(sum_i w_i B_i) with w found without gradients, by at most `steps` losses of a few
    examples (Huang et al. 2023, arXiv 2307.13269, eq. 1-2).

    The objective is loss + penalty * sum |w_i|, |w_i| <= bound, from w = 0. The paper searches with Shiwa of
    nevergrad; here it is Nelder & Mead's simplex (1965), whose corners are 0 and each member at one half.
    """
    import numpy as np
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    found: list[tuple[float, float, tuple[float, ...]]] = []

    def objective(point: Sequence[float]) -> float:
        weights = tuple(float(w) for w in point)
        value = loss(combined(layout, members, weights))
        found.append((value + penalty * sum(map(abs, weights)), value, weights))
        return found[-1][0]

    count = len(members)
    corners = np.vstack([np.zeros(count), 0.5 * np.eye(count)])
    options = {"maxfev": max(steps, count + 1), "initial_simplex": corners, "xatol": 1e-3, "fatol": 1e-5}
    minimize(objective, corners[0], method="Nelder-Mead", bounds=[(-bound, bound)] * count, options=options)
    _, value, weights = min(found)
    return Hub(weights, combined(layout, members, weights), value)

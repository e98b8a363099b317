"""S-BitFit: which biases to train is found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Density, Projections
from polygraft.grafts.spec import Affine, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_STAYS, _RISE = "bias_stays", "bias_rise"  # parts that no other method has, since the hook knows its tensors by them


def s_bitfit(density: Density = 0.5, prime: float = 0.3, at: Projections = "linear") -> tuple[Slot, ...]:
    """Biases are trained for a while, those without which the loss would hardly rise are pruned, and what is left is
    trained from the start: structured pruning of BitFit (Lawton et al. 2023, arXiv 2305.16597, section 3).

    `density` is the share of the biases that stay, `prime` the share of the steps before that. A bias stays by the
    first-order rise -b . dL/db, summed over these steps; the optimiser and its schedule start anew then.

    Deviations: None known. A pruned bias stays in its place as zeros.

    Choose when: it is of interest which biases matter, or the fewest must be kept.
    """
    for name, share in (("density", density), ("prime", prime)):
        if not 0 < share < 1:
            raise SpecError(f"peft: s-bitfit.{name}: {share} is outside (0, 1)")
    return (Affine(at=at, scale=False, shift=True, form=DeclRef("s-bitfit")),)


def _hooks(density: float = 0.5, prime: float = 0.3, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("s-bitfit", (("density", density), ("prime", prime))),)


def _own(slot: Affine, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "b": TensorDecl((place.d_out,)),
        _STAYS: TensorDecl((1,), "one", trained=False),
        _RISE: TensorDecl((1,), trained=False),
    }


def _operands(slot: Affine, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"b": values[_STAYS] * values["b"]}


def _primed(total: int, prime: float, **_: object) -> int:
    return int(prime * total)


def _prune(
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    step: int,
    total: int,
    density: float,
    prime: float,
) -> None:
    import torch

    stems = [name.removesuffix(_RISE) for name in values if name.endswith(f".{_RISE}")]
    last = _primed(total, prime) - 1
    if step <= last:
        for stem in stems:
            values[stem + _RISE].sub_((values[f"{stem}b"] * gradients[f"{stem}b"]).sum())
    if step == last:
        rises = torch.cat([values[stem + _RISE] for stem in stems])
        limit = rises.topk(max(1, int(density * len(rises)))).values[-1]
        for stem in stems:
            values[stem + _STAYS].copy_(values[stem + _RISE] >= limit)
            values[f"{stem}b"].zero_()


METHODS = (Method("s-bitfit", "arXiv 2305.16597", 3e-3, s_bitfit, hooks=_hooks),)
PARAMETRIZATIONS = (Parametrization("s-bitfit", _operands, _own),)
HOOKS = (Hook("s-bitfit", after_step=_prune, anew=_primed),)

"""SoRA: a gate on LoRA's ranks with a proximal step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_GATE = "keep"  # a part's name that no other method has, since the hook knows its tensors by it


def sora(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0, threshold: float = 1e-4
) -> tuple[Slot, ...]:
    """y += s B diag(g) A x with a gate g that a proximal step drives to exact zeros, so that ranks fall away (Ding et
    al. 2023, arXiv 2311.11696, section 3).

    `threshold` is the paper's eta lambda, the same at every step as in its authors' optimiser.

    Deviations: Ranks whose gate is 0 stay in their place while it trains; the paper's schedule of rising thresholds is
    left out.

    Choose when: the rank of each site should be found on the way from a large one.
    """
    if threshold < 0:
        raise SpecError(f"peft: sora.threshold: {threshold} is below 0")
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, form=DeclRef("sora")),)


def _hooks(threshold: float = 1e-4, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("sora", (("threshold", threshold),)),)


def _own(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        _GATE: TensorDecl((slot.rank,), DeclRef("normal", (("std", 1.0),))),
        "B": TensorDecl((slot.rank, place.d_out)),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"A": values[_GATE].unsqueeze(1) * values["A"], "B": values["B"]}


def _shrink(
    values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, total: int, threshold: float
) -> None:
    """g <- sign(g) max(|g| - threshold, 0)."""
    from torch.nn.functional import softshrink

    for name, gate in values.items():
        if name.endswith(f".{_GATE}"):
            gate.copy_(softshrink(gate, threshold))


METHODS = (Method("sora", "arXiv 2311.11696", 3e-4, sora, hooks=_hooks),)
PARAMETRIZATIONS = (Parametrization("sora", _operands, _own),)
HOOKS = (Hook("sora", after_step=_shrink),)

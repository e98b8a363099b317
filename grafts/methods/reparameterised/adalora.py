"""AdaLoRA: ranks shared out over all sites by importance.

Here A is Q [rank, in], B is P^T [rank, out]. What is smoothed lies beside the weights, as tensors that are not trained;
the E of the triplets outside the budget are set to 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = 0.85  # both betas of PEFT's default


def adalora(
    r: int = 12,
    alpha: float = 16.0,
    target: int = 8,
    at: str = "linear",
    dropout: float = 0.0,
    warmup: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    orthogonal: float = 0.5,
) -> tuple[Slot, ...]:
    """y += s P diag(E) Q x with a budget of ranks that is shared out over all sites by importance while it trains
    (Zhang et al. 2023, arXiv 2303.10512, eq. 3; importance by eq. 7 and 9 to 11, the budget's fall by eq. 12).

    `r` ranks a site at first and `target` in the mean at last. The budget stays whole for the first `warmup` of all
    steps and is final for the last `final`; between them ranks are pruned each `every` steps.

    Deviations: In PEFT's form: the penalty of eq. 4 that keeps P and Q orthogonal is the norm and not its square, and
    the means of a triplet's importances are added. Pruned ranks are zeros: sizes stay.

    Choose when: ranks should go where they matter. Small gains over LoRA, more state (smoothed importance beside each
    weight).
    """
    if not 0 < target <= r:
        raise SpecError(f"peft: adalora.target: {target} is not between 1 and the {r} ranks that training starts with")
    if warmup < 0 or final < 0 or warmup + final >= 1 or every < 1:
        raise SpecError(f"peft: adalora: warmup {warmup} + final {final} must leave steps to prune in, every {every}")
    # PEFT divides alpha by the ranks so, that none may be left
    return (Branch(at=at, rank=r, scale=alpha / (max(r, 1) + 1e-5), dropout=dropout, form=DeclRef("adalora")),)


def _hooks(
    target: int = 8,
    warmup: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    orthogonal: float = 0.5,
    **_: object,
) -> tuple[DeclRef, ...]:
    pruning = (("target", target), ("warmup", warmup), ("final", final), ("every", every))
    return (DeclRef("adalora", (("orthogonal", orthogonal), *pruning)),)


def _own(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    small = DeclRef("normal", (("std", 0.02),))
    shapes = {"A": (slot.rank, place.d_in), "E": (slot.rank,), "B": (slot.rank, place.d_out)}
    trained = {part: TensorDecl(shape, "zero" if part == "E" else small) for part, shape in shapes.items()}
    state = {
        f"{part}_{kept}": TensorDecl(shapes[part], trained=False) for part in shapes for kept in ("mean", "spread")
    }
    return trained | state


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"A": values["E"].unsqueeze(1) * values["A"], "B": values["B"]}


def _penalty(values: Mapping[str, Tensor], orthogonal: float, **_: object) -> Tensor:
    import torch

    factors = [values[stem + part] for stem in _stems(values) for part in "AB"]
    gaps = [torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows)).to(rows)) for rows in factors]
    return orthogonal * torch.stack(gaps).mean()


def _after_step(
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    step: int,
    total: int,
    target: int,
    warmup: float,
    final: float,
    every: int,
    **_: object,
) -> None:
    stems = _stems(values)
    start, stop = int(warmup * total), total - int(final * total)
    if step < stop:
        for name in (stem + part for stem in stems for part in "AEB"):
            sensitivity = (values[name] * gradients[name]).abs()
            mean = values[f"{name}_mean"].lerp_(sensitivity, 1 - _SMOOTHING)
            values[f"{name}_spread"].lerp_((sensitivity - mean).abs(), 1 - _SMOOTHING)
    whole = sum(len(values[f"{stem}E"]) for stem in stems)
    if step > stop:
        _keep(values, stems, target * len(stems))
    elif step > start and step % every == 0:
        left = (1 - (step - start) / (stop - start)) ** 3
        _keep(values, stems, int((whole - target * len(stems)) * left + target * len(stems)))


def _keep(values: Mapping[str, Tensor], stems: list[str], budget: int) -> None:
    """Set E to 0 outside the `budget` most important triplets of all sites."""
    import torch

    def score(name: str) -> Tensor:
        return values[f"{name}_mean"] * values[f"{name}_spread"]

    scores = [score(f"{s}E") + score(f"{s}A").mean(1) + score(f"{s}B").mean(1) for s in stems]
    together = torch.cat(scores)
    if budget < len(together):
        limit = together.kthvalue(len(together) - budget).values
        for stem, own in zip(stems, scores):
            values[f"{stem}E"].masked_fill_(own <= limit, 0.0)


def _stems(values: Mapping[str, Tensor]) -> list[str]:
    """The names of AdaLoRA's tensors at each site, up to the part."""
    return [name.removesuffix("E_spread") for name in values if name.endswith(".E_spread")]


METHODS = (Method("adalora", "arXiv 2303.10512", 1e-3, adalora, hooks=_hooks),)
PARAMETRIZATIONS = (Parametrization("adalora", _operands, _own),)
HOOKS = (Hook("adalora", penalty=_penalty, after_step=_after_step),)


def _schedule(warmup: float, final: float, **_: object) -> Config:
    """In steps of a thousand."""
    return {"total_step": 1000, "tinit": round(1000 * warmup), "tfinal": round(1000 * final)}


def _shares(config: Config) -> Config:
    total, begin, end = (config.get(key) for key in ("total_step", "tinit", "tfinal"))
    if not (isinstance(total, int) and isinstance(begin or 0, int) and isinstance(end or 0, int) and total > 0):
        return {}
    return {"warmup": (begin or 0) / total, "final": (end or 0) / total}  # type: ignore[operator]


PEFT = (
    Peft(
        kind="ADALORA",
        method="adalora",
        conv1d=True,
        names={
            "r": ("init_r", 12),
            "alpha": ("lora_alpha", 8),
            "target": ("target_r", 8),
            "dropout": ("lora_dropout", 0.0),
            "every": ("deltaT", 1),
            "orthogonal": ("orth_reg_weight", 0.5),
        },
        fields=_schedule,
        arguments=_shares,
        reads=("total_step", "tinit", "tfinal"),
        idle={"r": 8, "beta1": _SMOOTHING, "beta2": _SMOOTHING, "init_lora_weights": True, "rank_pattern": None},
        own={
            "A": Kept("lora_A", padded=True),
            "E": Kept("lora_E", shape=(-1, 1), padded=True),
            "B": Kept("lora_B", turned=(0, 1), padded=True),
        },
    ),
)

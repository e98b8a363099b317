"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA as P diag(E) Q, with the budget of ranks shared out by
importance.

Here A is Q [rank, in], B is P^T [rank, out]. P and Q are kept near orthogonal by a penalty. A triplet's importance is
that of E plus the means of P's and Q's (eq. 7) under the product of smoothed sensitivity |w dL/dw| and its smoothed
uncertainty (eq. 9-11). The budget falls along a cubic (eq. 12); the E of the triplets outside it are set to 0. What is
smoothed lies beside the weights, as tensors that are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = 0.85  # both betas of PEFT's default
_PENALTIES = ("norms", "squares")


def adalora(  # noqa: PLR0913
    r: Rank = 12,
    alpha: Alpha = 16.0,
    target: int = 8,
    at: Projections = "linear",
    dropout: Dropout = 0.0,
    warmup: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    orthogonal: float = 0.5,
    penalty: str = "norms",
) -> tuple[Slot, ...]:
    """AdaLoRA: y += s P diag(E) Q x (Zhang et al. 2023, arXiv 2303.10512, eq. 3), where the E of the triplets that
    matter least to the loss are set to 0 (eq. 7-12).

    `r` ranks a site at first and `target` in the mean at last. The budget stays whole for the first `warmup` of all
    steps and is final for the last `final`; between them ranks are pruned each `every` steps. `orthogonal` is the
    factor of the penalty that keeps P and Q near orthogonal: `norms` is that of the authors' code and of PEFT, the mean
    of |P^T P - I| and |Q Q^T - I| over all matrices, `squares` the paper's, the sum of their squares (eq. 4).

    Deviations: the default penalty is not the paper's (write penalty=squares, and a smaller factor: it sums over all
    sites). As in PEFT, alpha is divided by the ranks at first, and both smoothing factors are 0.85.

    Choose when: projections differ in how many ranks they deserve and a budget is fixed. It trains more than it keeps,
    and plain lora with a tuned learning rate is often as good.
    """
    if penalty not in _PENALTIES:
        raise SpecError(f"peft: adalora.penalty: {penalty!r} is unknown; choices: {', '.join(_PENALTIES)}")
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
    penalty: str = "norms",
    **_: object,
) -> tuple[DeclRef, ...]:
    pruning = (("target", target), ("warmup", warmup), ("final", final), ("every", every))
    return (DeclRef("adalora", (("orthogonal", orthogonal), ("penalty", penalty), *pruning)),)


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


def _penalty(values: Mapping[str, Tensor], orthogonal: float, penalty: str = "norms", **_: object) -> Tensor:
    import torch

    factors = [values[stem + part] for stem in _stems(values) for part in "AB"]
    gaps = torch.stack([torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows)).to(rows)) for rows in factors])
    return orthogonal * (gaps.square().sum() if penalty == "squares" else gaps.mean())


def _after_step(  # noqa: PLR0913
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
        for stem, own in zip(stems, scores, strict=True):
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

"""Methods that train all of dW and find its sparse support on the way: LT-SFT, diff pruning and Child-Tuning.

While they learn they cost what full fine-tuning of the same projections costs: at Llama 7B's shape 6.5 billion trained
numbers, 13 with gates, in 16 bytes each (weight, gradient and two moments in float32), and 4 bytes for each element of
a mask. A pack says so before anyone waits (`serving/http/submission.py`). Fewer projections (`at`) or layers (`@`) make
them smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING
from zlib import crc32

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Density, Projections
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]
# Parts that no other method has, since hooks know their tensors by them.
_CHANGE, _STAYS = "change", "stays"
_DIFF, _GATE, _GROUP, _KEPT, _FIXED = "diff", "diff_gate", "diff_group", "diff_kept", "diff_fixed"
_CHILD, _DICE = "child", "child_dice"
_LOW, _HIGH = -1.5, 1.5  # what the concrete distribution is stretched to


def lt_sft(density: Density = 0.05, prime: float = 0.5, at: Projections = "linear") -> tuple[Slot, ...]:
    """LT-SFT: after a share `prime` of the steps the share `density` of all entries that changed most stays, all are
    rewound to W, and only those that stay are trained (Ansell et al. 2022, arXiv 2110.07560, section 3.1).

    Deviations: projections alone, without embeddings, norms and biases; no L1 penalty. Optimiser and schedule start
    anew, as in the authors' code. The graft keeps dense matrices and their masks, and not the entries alone.

    Choose when: the sparse change of a full fine-tuning is wanted, to be added to others. It takes as much memory as
    full fine-tuning of the projections; for a sparse change in little memory take shira or fishmask.
    """
    _shares(density=density, prime=prime)
    return (Delta(at=at, form=DeclRef("lt-sft")),)


def diff_pruning(
    density: Density = 0.005,
    relax: float = 0.7,
    penalty: float = 1.25e-7,
    at: Projections = "linear",
    structured: int = 0,
) -> tuple[Slot, ...]:
    """Diff pruning: dW = z * w with gates z from the hard concrete distribution and a penalty on how many are open;
    after a share `relax` of the steps dW keeps its share `density` of largest entries, which learn on without gates
    (Guo et al. 2021, arXiv 2012.07463, sections 3.1 to 3.3).

    With `structured`=1 every matrix has a gate, too, which its entries' are multiplied by (3.3).

    Deviations: projections alone; groups are matrices, where the paper's are matrices and biases.

    Choose when: what a task changes in W is to be as sparse as its loss allows. It trains two numbers an entry of W;
    for a sparse change in little memory take shira or fishmask.
    """
    _shares(density=density, relax=relax)
    if structured not in (0, 1):
        raise SpecError(f"peft: structured: {structured} is neither 0 nor 1")
    return (Delta(at=at, form=DeclRef("diff-groups" if structured else "diff")),)


def child_tuning(p: Density = 0.3, at: Projections = "linear") -> tuple[Slot, ...]:
    """Child-Tuning_F: every step a random share `p` of the gradient of W is kept, divided by p (Xu et al. 2021, arXiv
    2109.05687, section 2). With p=1 it is full fine-tuning of the projections, as PEFT's modules_to_save.

    Deviations: projections alone; what the optimiser's moments move where the gradient is masked is not masked, as in
    the authors' code. Child-Tuning_D, whose mask stays, is fishmask.

    Choose when: full fine-tuning of the projections is wanted, with a noise that keeps it from overfitting few
    examples. It takes as much memory as full fine-tuning; take lora where that is short.
    """
    if not 0 < p <= 1:
        raise SpecError(f"peft: p: {p} is outside (0, 1]")
    return (Delta(at=at, form=DeclRef("child")),)


def _shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise SpecError(f"peft: {name}: {share} is outside (0, 1)")


def _lt_hooks(density: float = 0.05, prime: float = 0.5, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("lt-sft", (("density", density), ("prime", prime))),)


def _diff_hooks(
    density: float = 0.005, relax: float = 0.7, penalty: float = 1.25e-7, **_: object
) -> tuple[DeclRef, ...]:
    return (DeclRef("diff", (("density", density), ("relax", relax), ("rate", penalty))),)


def _child_hooks(p: float = 0.3, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("child", (("p", p),)),)


def _lt_own(slot: Delta, place: SiteShape) -> Mapping[str, TensorDecl]:
    shape = (place.d_out, place.d_in)
    return {_CHANGE: TensorDecl(shape), _STAYS: TensorDecl(shape, "one", trained=False)}


def _lt(slot: Delta, values: Values, lowering: Lowering) -> Values:
    return {"W": values[_STAYS] * values[_CHANGE]}


def _rewind(values: Values, gradients: Values, step: int, total: int, density: float, prime: float) -> None:
    if step + 1 == _primed(total, prime):
        _keep_largest({name: value for name, value in values.items() if name.endswith(f".{_CHANGE}")}, density, values)
        for name in gradients:
            if name.endswith(f".{_CHANGE}"):
                values[name].zero_()


def _primed(total: int, prime: float, **_: object) -> int:
    return int(prime * total)


def _keep_largest(changes: Values, density: float, values: Values) -> None:
    """Mark the largest share `density` of all sites' changes together, in the mask beside each."""
    import torch

    flat = torch.cat([change.abs().flatten() for change in changes.values()])
    limit = flat.topk(max(1, int(density * len(flat)))).values[-1]
    for name, change in changes.items():
        values[name.removesuffix(_CHANGE).removesuffix(_DIFF) + (_STAYS if name.endswith(_CHANGE) else _KEPT)].copy_(
            (change.abs() >= limit).to(change.dtype)
        )


def _diff_own(slot: Delta, place: SiteShape) -> Mapping[str, TensorDecl]:
    shape = (place.d_out, place.d_in)
    return {
        _DIFF: TensorDecl(shape),
        _GATE: TensorDecl(shape, DeclRef("full", (("value", 5.0),))),
        _KEPT: TensorDecl(shape, "one", trained=False),
        _FIXED: TensorDecl((1,), trained=False),
    }


def _grouped_own(slot: Delta, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {**_diff_own(slot, place), _GROUP: TensorDecl((1,), DeclRef("full", (("value", 5.0),)))}


def _diff(slot: Delta, values: Values, lowering: Lowering) -> Values:
    import torch

    z = _gates(values[_GATE], lowering)
    if _GROUP in values:
        z = z * _gates(values[_GROUP], lowering, _GROUP)
    return {"W": values[_KEPT] * torch.where(values[_FIXED] > 0, values[_DIFF], z * values[_DIFF])}


def _gates(logits: Tensor, lowering: Lowering | None = None, what: str = "") -> Tensor:
    """The hard concrete gates of a step, or their middle."""
    import torch

    if lowering is not None and lowering.draw is not None:
        logits = logits + torch.logit(uniform(lowering.draw, lowering.place, logits, what), eps=1e-6)
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def uniform(draw: int, place: SiteShape, like: Tensor, what: str = "") -> Tensor:
    """Random numbers of an optimiser step and a site alone, for `what` there."""
    import torch

    seed = crc32(f"{draw}/{place.layer}.{place.name}{what}".encode())
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)


def _open_gates(values: Values, rate: float, **_: object) -> Tensor:
    """`rate` times the expected number of open gates, sum of sigmoid(a - log(-low / high)), an entry's and its group's
    at once."""
    import torch

    counts = []
    for name, value in values.items():
        if name.endswith(f".{_GATE}"):
            site = name.removesuffix(_GATE)
            likely = torch.sigmoid(value - log(-_LOW / _HIGH)).sum()
            if f"{site}{_GROUP}" in values:
                likely = likely * torch.sigmoid(values[f"{site}{_GROUP}"] - log(-_LOW / _HIGH))
            counts.append(likely * (1 - values[f"{site}{_FIXED}"]))
    return rate * torch.cat(counts).sum()


def _project(
    values: Values, gradients: Values, step: int, total: int, density: float, relax: float, **_: object
) -> None:
    if step + 1 != int(relax * total):
        return
    changes = {}
    for name in (name for name in gradients if name.endswith(f".{_DIFF}")):
        site = name.removesuffix(_DIFF)
        z = _gates(values[f"{site}{_GATE}"])
        if f"{site}{_GROUP}" in values:
            z = z * _gates(values[f"{site}{_GROUP}"])
        changes[name] = values[name].mul_(z)
        values[f"{site}{_FIXED}"].fill_(1.0)
    _keep_largest(changes, density, values)


def _child_own(slot: Delta, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {_CHILD: TensorDecl((place.d_out, place.d_in)), _DICE: TensorDecl((2,), "child_dice", trained=False)}


def _child(slot: Delta, values: Values, lowering: Lowering) -> Values:
    return {"W": values[_CHILD]}


def _dice(tensor: TensorSpec, making: Making) -> Tensor:
    """(a number of the job's seed and the site that float32 holds, how often it was used)."""
    import torch

    return torch.tensor([float(torch.randint(1 << 24, (1,), generator=making.generator(tensor.name))), 0.0])


def _drop(values: Values, gradients: Values, p: float) -> None:
    import torch

    own = [name for name in gradients if name.endswith(f".{_CHILD}")]
    dice = [values[name.removesuffix(_CHILD) + _DICE] for name in own]
    for name, mine, (number, used) in zip(own, dice, torch.stack(dice).cpu().tolist(), strict=True):
        seed, gradient = crc32(f"{int(number)}/{int(used)}".encode()), gradients[name]
        kept = torch.rand(gradient.shape, generator=torch.Generator().manual_seed(seed)) < p
        gradient.div_(p).masked_fill_(~kept.to(gradient.device), 0.0)
        mine[1] += 1


METHODS = (
    Method("lt-sft", "arXiv 2110.07560", 1e-4, lt_sft, hooks=_lt_hooks),
    Method("diff-pruning", "arXiv 2012.07463", 1e-4, diff_pruning, hooks=_diff_hooks),
    Method("child-tuning", "arXiv 2109.05687", 1e-4, child_tuning, aliases=("child-tuning-f",), hooks=_child_hooks),
)
PARAMETRIZATIONS = (
    Parametrization("lt-sft", _lt, _lt_own),
    Parametrization("diff", _diff, _diff_own),
    Parametrization("diff-groups", _diff, _grouped_own),
    Parametrization("child", _child, _child_own),
)
STARTS = (Start("child_dice", _dice),)
HOOKS = (
    Hook("lt-sft", after_step=_rewind, anew=_primed),
    Hook("diff", penalty=_open_gates, after_step=_project),
    Hook("child", gradient=_drop),
)

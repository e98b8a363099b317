"""Some directions of W's output are taken away and others put there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Projections, Rank, Scale
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def deft(r: Rank = 8, scale: Scale = 1.0, by: str = "relu", at: Projections = "linear") -> tuple[Slot, ...]:
    """Some directions of W's output are taken away and others put there: W' = (I - Q K^T) W + s Q R with Q = P and K =
    relu(P), or both the orthonormal columns of P with by=qr (DEFT, NeurIPS 2025, as in PEFT).

    Deviations: Held against PEFT 0.21 and not against the paper's text. It is a branch y += Q (s R - K^T W) x.

    Choose when: a concept has to be replaced and not only added, as in image generation, for which it was made.
    """
    return _branch("deft", r, by, at, ("by", by), ("scale", scale))


def para(r: Rank = 8, by: str = "qr", at: Projections = "linear") -> tuple[Slot, ...]:
    """W' = (I - Q Q^T) W: the outputs lose r trained directions and gain none (arXiv 2406.05641, as PEFT's DEFT with
    para).

    Deviations: PEFT's form, whose projection may be by relu(P) in place of the paper's QR.

    Choose when: something has to be unlearned, or a style narrowed. It trains half of LoRA's numbers and can only
    remove.
    """
    return _branch("para", r, by, at, ("by", by))


def _branch(form: str, r: int, by: str, at: str, *arguments: tuple[str, int | float | str]) -> tuple[Slot, ...]:
    if by not in ("relu", "qr"):
        raise SpecError(f"peft: {form}.by: {by!r} is not a projection; choices: relu, qr")
    return (Branch(at=on_projections(at), rank=r, form=DeclRef(form, arguments)),)


def _para_own(slot: Branch, place: SiteShape, by: str) -> Parts:
    if slot.rank > place.d_out:
        raise SpecError(f"r: {slot.rank} is more than the {place.d_out} outputs of {place.name}")
    return {"P": TensorDecl((slot.rank, place.d_out), "normal")}


def _deft_own(slot: Branch, place: SiteShape, by: str, scale: float) -> Parts:
    removed = DeclRef("removed", (("by", by), ("scale", scale)))
    return {**_para_own(slot, place, by), "R": TensorDecl((slot.rank, place.d_in), removed)}


def _para(slot: Branch, values: Values, lowering: Lowering, by: str) -> Values:
    Q, K = _projection(values["P"], by)
    return {"A": -K @ lowering.weight().to(K.dtype), "B": Q}


def _deft(slot: Branch, values: Values, lowering: Lowering, by: str, scale: float) -> Values:
    taken = _para(slot, values, lowering, by)
    return {"A": scale * values["R"] + taken["A"], "B": taken["B"]}


def _projection(P: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """Q and K, both as rows [r, out]."""
    from torch import linalg

    if by == "relu":
        return P, P.relu()
    Q = linalg.qr(P.T).Q.T
    return Q, Q


def _removed(tensor: TensorSpec, making: Making, by: str, scale: float) -> Tensor:
    """What is taken away is put back: R = K^T W / s, with P's own start."""
    import torch

    assert tensor.site is not None
    W, name = making.weight(tensor.site), tensor.name.removesuffix("R") + "P"
    P = 0.02 * torch.randn(tensor.shape[0], len(W), generator=making.generator(name))
    return _projection(P.to(W.dtype), by)[1] @ W / scale


METHODS = (
    Method("deft", "NeurIPS 2025, DEFT", 1e-4, deft),
    Method("para", "arXiv 2406.05641", 1e-4, para),
)
PARAMETRIZATIONS = (Parametrization("deft", _deft, _deft_own), Parametrization("para", _para, _para_own))
STARTS = (Start("removed", _removed),)


def _scale(config: Config) -> Config:
    rank, alpha = config.get("r") or 8, config.get("alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float | None)):
        raise SpecError(f"r, alpha: {rank!r} and {alpha!r} are not numbers")
    return {"scale": alpha / max(rank, 1) if alpha else 1.0}


_IDLE: Mapping[str, object] = {"init_weights": True, "init_scale": 1.0, "deft_dropout": None}
_KEPT = {"P": Kept("deft_P", turned=(0, 1)), "R": Kept("deft_R")}
PEFT = (
    Peft(
        kind="DEFT",
        method="deft",
        conv1d=True,
        names={"r": ("r", 8), "by": ("decomposition_method", "relu")},
        fields=lambda r, scale, **_: {"alpha": scale * r},
        arguments=_scale,
        reads=("alpha",),
        fixed={"para": False},
        idle=_IDLE,
        own=_KEPT,
    ),
    Peft(
        kind="DEFT",
        method="para",
        conv1d=True,
        names={"r": ("r", 8), "by": ("decomposition_method", "relu")},
        fixed={"para": True},
        idle=_IDLE,
        own=_KEPT,
    ),
)

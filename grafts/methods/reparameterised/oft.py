"""Orthogonal finetuning by blocks, one factor (OFT) or several in a butterfly's order (BOFT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Block, Projections
from polygraft.grafts.spec import Affine, DeclRef, Rotate, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def oft(b: Block = 32, neumann: int = 5, at: Projections = "linear") -> tuple[Slot, ...]:
    """W' = W R with R block-diagonal and orthogonal, by a Cayley transform of a skew-symmetric matrix (Qiu et al. 2023,
    arXiv 2306.07280, eq. 2 and 3). With `neumann` terms the inverse in it is a truncated Neumann series
    (OFTv2: Qiu et al. 2025, arXiv 2506.19847, section 3.3), exact with 0.

    Blocks are of size `b`.

    Deviations: Without the constraint of COFT and the scale of every neuron, which the first paper has as variants.
    Its R turns the neurons; here, in OFTv2 and in PEFT it turns what they read, which is the same with R transposed.

    Choose when: what the backbone knows must be kept: angles between neurons stay. Nothing is made dense.
    """
    if neumann and neumann < 4:
        raise SpecError(f"neumann: {neumann} terms; give at least 4, or 0 for the exact inverse")
    return (Rotate(at=at, kind="blocks", size=b, form=DeclRef("oft", (("neumann", neumann),))),)


def boft(b: Block = 4, m: int = 1, at: Projections = "linear") -> tuple[Slot, ...]:
    """W' = diag(s) W R with R a product of m orthogonal factors with blocks of size b in a butterfly's order, so that
    every input meets every other (Liu et al. 2024, arXiv 2311.06243, eq. 1 and 2).

    Deviations: The scale of every row of W is PEFT's.

    Choose when: OFT's blocks are too local. It is slow: m products of blocks a site and step.
    """
    rotation = Rotate(at=at, kind="blocks", size=b, stages=m, form=DeclRef("boft"))
    return rotation, Affine(at=at, scale=True, shift=False, side="rows")


def _oft_own(slot: Rotate, place: SiteShape, neumann: int) -> Mapping[str, TensorDecl]:
    slot.check(place.d_in)
    return {"q": TensorDecl((place.d_in // slot.size, slot.size * (slot.size - 1) // 2))}


def _oft(slot: Rotate, values: Mapping[str, Tensor], lowering: Lowering, neumann: int) -> Mapping[str, Tensor]:
    """`q` is the upper triangle of the skew-symmetric Q of every block. As in PEFT the series turns one way, R ~
    (1 + Q) (1 - Q)^-1, and the exact inverse the other."""
    import torch

    q = values["q"]
    upper = torch.triu_indices(slot.size, slot.size, 1, device=q.device)
    each = torch.arange(len(q), device=q.device)[:, None]
    Q = q.new_zeros(len(q), slot.size, slot.size).index_put((each, *upper), q)
    Q = Q - Q.mT
    if not neumann:
        return {"D": _cayley(Q).reshape(-1, slot.size)}
    D, power = 2 * Q, Q
    for _ in range(2, neumann - 1):
        power = power @ Q
        D = D + 2 * power
    return {"D": (D + power @ Q).reshape(-1, slot.size)}


def _boft_own(slot: Rotate, place: SiteShape) -> Mapping[str, TensorDecl]:
    slot.check(place.d_in)
    return {"R": TensorDecl((slot.stages, place.d_in // slot.size, slot.size, slot.size))}


def _boft(slot: Rotate, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    R = values["R"]
    return {"D": _cayley(0.5 * (R - R.mT)).reshape(-1, slot.size)}


def _cayley(Q: Tensor) -> Tensor:
    """(1 - Q) (1 + Q)^-1 - 1 of skew-symmetric matrices, which is -2 Q (1 + Q)^-1."""
    import torch

    turned: Tensor = torch.linalg.solve(torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + Q, -2 * Q, left=False)
    return turned


METHODS = (
    Method("oft", "arXiv 2306.07280", 1e-4, oft),
    Method("boft", "arXiv 2311.06243", 1e-4, boft),
)
PARAMETRIZATIONS = (Parametrization("oft", _oft, _oft_own), Parametrization("boft", _boft, _boft_own))


def _neumann(config: Config) -> Config:
    series = config.get("use_cayley_neumann", True)
    return {"neumann": config.get("num_cayley_neumann_terms", 5) if series else 0}


PEFT = (
    Peft(
        kind="OFT",
        method="oft",
        separable=True,
        names={"b": ("oft_block_size", 32)},
        fields=lambda neumann, **_: {"use_cayley_neumann": bool(neumann), "num_cayley_neumann_terms": neumann or 5},
        arguments=_neumann,
        reads=("use_cayley_neumann", "num_cayley_neumann_terms"),
        idle={"init_weights": True, "eps": 6e-5, "module_dropout": None},
        own={"q": Kept("oft_R.weight")},
    ),
    Peft(
        kind="BOFT",
        method="boft",
        separable=True,
        names={"b": ("boft_block_size", 4), "m": ("boft_n_butterfly_factor", 1)},
        idle={"init_weights": True, "boft_dropout": None},
        own={"R": Kept("boft_R"), "g": Kept("boft_s", shape=(-1, 1), rows=True)},
    ),
)

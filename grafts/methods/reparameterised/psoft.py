"""PSOFT: W's largest singular directions turned among themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.methods.ranges import Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]


def psoft(r: Rank = 32, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """The r largest singular directions of W are turned among themselves, y += U S (R - I) V^T x with R = diag(b) (I +
    Q) (I - Q)^-1 diag(a), Q skew-symmetric; only Q, a and b are trained (OpenReview FSHrinMArK, eq. 8).

    Deviations: PEFT's form with the exact inverse; its Neumann series and other starts are refused.

    Choose when: orthogonal finetuning is wanted at a small size: r^2 / 2 numbers a site.
    """
    if r < 2:
        raise SpecError(f"peft: psoft.r: {r} directions cannot be turned; give at least 2")
    return (Branch(at=on_projections(at), rank=r, dropout=dropout, form=DeclRef("psoft")),)


def _own(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    r = slot.rank
    return {
        "A": TensorDecl((r, place.d_in), "truncated", trained=False),
        "B": TensorDecl((r, place.d_out), "truncated", trained=False),
        "q": TensorDecl((r * (r - 1) // 2,)),
        "before": TensorDecl((r,), "one"),
        "after": TensorDecl((r,), "one"),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    import torch

    q, r = values["q"], slot.rank
    eye = torch.eye(r, dtype=q.dtype, device=q.device)
    rows, columns = torch.triu_indices(r, r, 1, device=q.device)
    upper = torch.zeros_like(eye).index_put((rows, columns), q)
    Q = upper - upper.T
    R = values["after"].unsqueeze(1) * torch.linalg.solve(eye - Q, eye + Q, left=False) * values["before"]
    return {"A": (R - eye) @ values["A"], "B": values["B"]}


METHODS = (Method("psoft", "OpenReview FSHrinMArK", 1e-4, psoft),)
PARAMETRIZATIONS = (Parametrization("psoft", _operands, _own),)


def _pack(
    values: Values, layout: Sequence[TensorSpec], module: Callable[..., str], backbone_files: BackboneFiles, _: object
) -> Values:
    return {
        f"{module(tensor.site)}.psoft_R.{_KEPT[tensor.part]}": values[tensor.name]
        for tensor in layout
        if tensor.part in _KEPT
    }


def _unpack(
    stored: Values, layout: Sequence[TensorSpec], module: Callable[..., str], backbone_files: BackboneFiles, _: object
) -> Values:
    """A and B are not in PEFT's file: it makes them from W again."""
    from torch import linalg

    found: dict[str, Tensor] = {}
    for tensor in layout:
        assert tensor.site is not None
        if tensor.part in _KEPT:
            found[tensor.name] = stored[f"{module(tensor.site)}.psoft_R.{_KEPT[tensor.part]}"]
        elif tensor.part == "A":
            rank = tensor.shape[0]
            U, S, Vh = linalg.svd(backbone_files.whole(tensor.site), full_matrices=False)
            found[tensor.name] = Vh[:rank]
            found[f"{tensor.name.removesuffix('A')}B"] = S[:rank].unsqueeze(1) * U.T[:rank]
    return found


_KEPT = {"q": "weight", "before": "vector_a", "after": "vector_b"}
PEFT = (
    Peft(
        kind="PSOFT",
        method="psoft",
        biases=False,
        conv1d=True,
        names={"r": ("r", 32), "dropout": ("psoft_dropout", 0.0)},
        needs={
            "ab_svd_init": "psoft_init",
            "psoft_svd": "full",
            "psoft_orth": True,
            "psoft_mag_a": True,
            "psoft_mag_b": True,
            "use_cayley_neumann": False,
        },
        idle={
            "init_weights": True,
            "psoft_alpha": 32,  # what it multiplies is divided by it, too
            "psoft_svd_lowrank_niter": 10,
            "num_cayley_neumann_terms": 5,
            "cayley_neumann_eps": None,
            "random_seed": None,
        },
        written=False,
        packed=Packed(_pack, _unpack, reads_backbone=True),
    ),
)

"""ReFT: edits of the residual stream in a subspace of low rank, of the prompt's first and last tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Ends, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


def loreft(r: Rank = 4, first: Ends = 7, last: Ends = 7, at: str = "block.out") -> tuple[Slot, ...]:
    """h + R^T (W h + b - R h) on the residual stream after each layer, R with orthonormal rows: an edit within a
    subspace of rank r, of the prompt's first and last tokens alone (Wu et al. 2024, arXiv 2404.03592, eq. 2 and section
    4).

    `first` and `last` tokens of the prompt have the same edit; where a prompt is shorter each is edited once, and
    generated tokens are not. Two terms, of first=7, last=0 and first=0, last=7, give the ends edits of their own; with
    0 and 0 every token is edited.

    Deviations: Both ends share one edit by default (tied, as the paper has it as an option). R is the first columns of
    a product of Householder reflections, one of the maps of torch's orthogonal parametrisation, which the authors use.

    Choose when: few numbers and a strong effect on instruction-like tasks are wanted. It edits rows of the prompt
    alone, so decoding costs nothing; it does not merge.
    """
    return (_edit(r, first, last, at, DeclRef("reft", (("orthonormal", 1),))),)


def noreft(r: Rank = 4, first: Ends = 7, last: Ends = 7, at: str = "block.out") -> tuple[Slot, ...]:
    """LoReFT with any R in place of an orthonormal one, h + R^T (W h + b - R h) (in the authors' library; LoReFT is Wu
    et al. 2024, arXiv 2404.03592, eq. 2).

    `first` and `last` are as in `loreft`.

    Deviations: None known beside those of `loreft`.

    Choose when: `loreft`'s orthogonality costs too much time in training.
    """
    return (_edit(r, first, last, at, DeclRef("reft", (("orthonormal", 0),))),)


def direft(r: Rank = 4, first: Ends = 7, last: Ends = 7, at: str = "block.out") -> tuple[Slot, ...]:
    """h + W2^T (W1 h + b) on the residual stream of the prompt's first and last tokens: LoReFT without the difference
    and the orthogonality (Wu et al. 2024, arXiv 2404.03592, eq. 3).

    `first` and `last` are as in `loreft`.

    Deviations: None known beside the shared edit of both ends.

    Choose when: ReFT is wanted at its cheapest; the paper finds it a little behind LoReFT.
    """
    return (_edit(r, first, last, at),)


def _edit(r: int, first: int, last: int, at: str, form: DeclRef | None = None) -> Branch:
    return Branch(at=at, rank=r, tap="output", bias=True, first=first, last=last, form=form)


def _own(slot: Branch, place: SiteShape, orthonormal: int) -> Mapping[str, TensorDecl]:
    rotation = DeclRef("normal", (("std", 1.0),)) if orthonormal else "kaiming"
    return {
        "R": TensorDecl((slot.rank, place.d_out), rotation),
        "W": TensorDecl((slot.rank, place.d_out), "kaiming"),
        "b": TensorDecl((slot.rank, 1)),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, orthonormal: int) -> Mapping[str, Tensor]:
    R = _reflected(values["R"]) if orthonormal else values["R"]
    return {"A": values["W"] - R, "B": R, "a": values["b"]}


def _reflected(vectors: Tensor) -> Tensor:
    """Orthonormal rows, as many as `vectors`: vector i counts from its element i + 1 on, before which stands a 1."""
    import torch

    below = vectors.T.tril(-1)
    rotation: Tensor = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0)))
    return rotation.T


METHODS = (
    Method("loreft", "arXiv 2404.03592", 1e-3, loreft),
    Method("noreft", "arXiv 2404.03592", 1e-3, noreft),
    Method("direft", "arXiv 2404.03592", 1e-3, direft),
)
PARAMETRIZATIONS = (Parametrization("reft", _operands, _own),)

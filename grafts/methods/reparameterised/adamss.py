"""AdaMSS: small updates of clusters of W's rows. A_k starts as the main directions of the cluster's rows, B_k at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Peft
from polygraft.grafts.methods.ranges import Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

_ROUNDS = 10  # of k-means, as in PEFT


def adamss(r: Rank = 100, subspaces: int = 5, rank: int = 1, at: Projections = "attn.[qv]") -> tuple[Slot, ...]:
    """The rows of W fall into K clusters by their coordinates in its r largest right singular directions N, and each
    cluster k takes a small update of its own in these directions, dW_k = B_k A_k N, with only A_k and B_k trained
    (Zheng et al. 2025, NeurIPS, AdaMSS, eq. 10, as PEFT 0.21 has it).

    `r` directions of W, or as many as it has; `subspaces` clusters of its rows, each with an update of `rank`.

    Deviations: Without the pruning of clusters on the way, and K is given, where the paper may estimate it. As in PEFT
    all clusters read the N of the whole W; the paper's are a cluster's own, which in general span the same where it has
    r rows or more. Where a projection has a bias PEFT's N reads a constant, too, which no column of W is, and ours does
    not. PEFT's folders do not say which row is in which cluster, so they are not read.

    Choose when: a graft should be small and sensitive to W's own structure; its start takes an SVD and k-means of each
    W.
    """
    if min(r, subspaces, rank) < 1:
        raise SpecError(f"peft: adamss: r {r}, subspaces {subspaces}, rank {rank} are not sizes; give at least 1")
    form = DeclRef("adamss", (("r", r), ("subspaces", subspaces)))
    return (Branch(at=on_projections(at), rank=subspaces * rank, form=form),)


def _own(slot: Branch, place: SiteShape, r: int, subspaces: int) -> Mapping[str, TensorDecl]:
    if place.d_out < subspaces:
        raise SpecError(f"peft: adamss.subspaces: {subspaces} of the {place.d_out} rows of a projection")
    r = min(r, place.d_in, place.d_out)
    start = DeclRef("row-clusters", (("r", r), ("count", subspaces)))
    return {
        "N": TensorDecl((r, place.d_in), start, trained=False),
        "cluster": TensorDecl((place.d_out,), start, trained=False),
        "A": TensorDecl((subspaces, slot.rank // subspaces, r), start),
        "B": TensorDecl((place.d_out, slot.rank // subspaces)),
    }


def _operands(
    slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, r: int, subspaces: int
) -> Mapping[str, Tensor]:
    import torch

    B = values["B"].T  # [rank, out]
    own = values["cluster"] == torch.arange(subspaces, device=B.device).unsqueeze(1)  # [K, out]
    masked = torch.where(own.unsqueeze(1), B, 0.0)
    return {"A": (values["A"] @ values["N"]).flatten(0, 1), "B": masked.flatten(0, 1)}


def _start(tensor: TensorSpec, making: Making, r: int, count: int) -> Tensor:
    """N, the cluster of every row, or the main directions of each cluster's rows; a cluster with fewer rows than that
    has fewer directions, and the others stay 0."""
    import torch

    site = tensor.site
    assert site is not None
    U, _, Vh = making.once(("adamss", site), lambda: torch.linalg.svd(making.weight(site), full_matrices=False))
    rows: Tensor = U[:, :r]
    seed = making.generator(f"{tensor.slot}.{site}.clusters")
    cluster = making.once(("adamss", tensor.slot, site), lambda: _clusters(rows, count, seed))
    if tensor.part != "A":
        N: Tensor = Vh[:r]
        return N if tensor.part == "N" else cluster
    A = rows.new_zeros(tensor.shape)
    for k in range(count):
        main = torch.linalg.svd(rows[cluster == k], full_matrices=False)[2][: A.shape[1]]
        A[k, : len(main)] = main
    return A


def _clusters(rows: Tensor, count: int, seed: Generator) -> Tensor:
    """The nearest of as many means for each row (Lloyd's algorithm, from rows at random)."""
    import torch

    means = rows[torch.randperm(len(rows), generator=seed)[:count]]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(rows, means).argmin(1)
        for k in range(count):
            if (nearest == k).any():
                means[k] = rows[nearest == k].mean(0)
    return torch.cdist(rows, means).argmin(1)


METHODS = (Method("adamss", "NeurIPS 2025, AdaMSS", 1e-3, adamss),)
PARAMETRIZATIONS = (Parametrization("adamss", _operands, _own),)
STARTS = (Start("row-clusters", _start),)
PEFT = (
    Peft(
        kind="ADAMSS",
        method="adamss",
        biases=False,
        names={"r": ("r", 100), "subspaces": ("num_subspaces", 5), "rank": ("subspace_rank", 1)},
        needs={"use_asa": False, "use_dynamic_rank": False},
        idle={
            "init_weights": "orthogonal",
            "random_seed": 0,
            "asa_target_subspaces": 50,
            "init_warmup": 50,
            "final_warmup": 1000,
            "mask_interval": 100,
            "asa_importance_beta": 0.85,
            "asa_uncertainty_beta": 0.85,
            "asa_schedule_exponent": 3.0,
            "svd_threshold": 0.1,
        },
        only="job",
    ),
)

"""LoRA that starts from what the bare backbone does on the job's first samples (grafts/calibrate.py). CorDA and LoRA-GA
keep B0 A0 out of W by a frozen branch, as PiSSA does (spectral.py)."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, Start
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections, shifted, strength, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sites import Site
    from polygraft.grafts.sizes import TensorSpec


def eva(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """LoRA whose A starts as the r principal directions of what the projection reads on the job's first samples, B at 0
    (Paischer et al. 2024, arXiv 2410.07170, section 3.2 and theorem 3.1).

    Deviations: Every site keeps r ranks (the paper's rho = 1), since a graft's sizes are those it was asked for with;
    the directions are of centred inputs.

    Choose when: few steps must suffice: it is LoRA after its start, which costs one pass over some samples.
    """
    start = DeclRef("principal")
    return (Branch(at=on_projections(at), rank=r, scale=alpha / max(r, 1), dropout=dropout, start=start),)


def corda(r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear", mode: str = "ipm") -> tuple[Slot, ...]:
    """LoRA that starts from a decomposition of W under the covariance C of its inputs, W C = U S V^T; A0, B0 are r
    triplets of U S (V^T C^-1): the first ones (`ipm`, adapt to the samples) or the last (`kpm`, keep what they hold)
    (Yang et al. 2024, arXiv 2406.05223, eq. 2 to 5).

    Deviations: B0 A0 is kept out of W by a frozen branch, as W is shared. C is of the job's own first samples: for
    `kpm` the paper takes samples of the knowledge to keep.

    Choose when: the first steps matter (ipm) or old knowledge does (kpm). It trains with twice the ranks' products.
    """
    if mode not in ("ipm", "kpm"):
        raise SpecError(f"peft: corda.mode: {mode!r} is unknown; choices: ipm, kpm")
    return shifted(r, alpha / max(r, 1), at, DeclRef("corda", (("mode", mode),)))


def lora_ga(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", gamma: float = 16.0) -> tuple[Slot, ...]:
    """LoRA that starts along the first gradient: dL/dW = U S V^T, A0 takes the first r right vectors, B0 the next r
    left ones, both times d_out^(1/4) / gamma^(1/2), with the scale alpha / sqrt(r) (Wang et al. 2024, arXiv 2407.05000,
    algorithm 1, which minimises eq. 3).

    Deviations: B0 A0 is kept out of W by a frozen branch, as W is shared. The gradient is that of the job's first
    samples. The factor is algorithm 1's; the text of v2 has it without the root of gamma, a slip by an author's word.

    Choose when: LoRA converges too slowly; its start costs a gradient of every W and an SVD of it.
    """
    if gamma <= 0:
        raise SpecError(f"peft: lora-ga.gamma: {gamma} is not above 0")
    return shifted(r, alpha / sqrt(max(r, 1)), at, DeclRef("lora-ga", (("gamma", gamma),)))


def _principal(tensor: TensorSpec, making: Making) -> Tensor:
    import torch

    rank = tensor.shape[0]
    if tensor.part == "B":
        return torch.zeros(tensor.shape)
    weight_of(tensor, making)

    def moments() -> dict[Site, Tensor]:
        """Sums of [1, x] [1, x]^T over all rows."""
        sums = {site: torch.zeros(x + 1, x + 1, dtype=torch.float64) for site, x in making.inputs.items()}

        def seen(site: Site, x: Tensor) -> None:
            rows = torch.nn.functional.pad(x.double(), (1, 0), value=1.0)
            sums[site].addmm_(rows.T, rows)

        making.observe(seen)
        return sums

    assert tensor.site is not None
    sums = making.once("moments", moments)[tensor.site]
    count, total = sums[0, 0], sums[0, 1:]
    vectors: Tensor = torch.linalg.eigh(sums[1:, 1:] - torch.outer(total, total) / count)[1]  # by rising variance
    return vectors.T.flip(0)[:rank].clone()


def _corda(tensor: TensorSpec, making: Making, mode: str) -> Tensor:
    import torch

    rank, scale = tensor.shape[0], strength(tensor, making)

    def moments() -> dict[Site, Tensor]:
        """Means over the samples of x^T x, each sample's x divided by its largest value."""
        sums = {site: torch.zeros(x, x, dtype=torch.float64) for site, x in making.inputs.items()}

        def seen(site: Site, x: Tensor) -> None:
            rows = x.double() / x.max().abs()
            sums[site].addmm_(rows.T, rows, alpha=1 / max(1, making.observed))

        making.observe(seen)
        return sums

    def make() -> tuple[Tensor, Tensor]:
        assert tensor.site is not None
        moment = making.once("sample moments", moments)[tensor.site]
        damped, inverse = _inverted(moment)
        U, S, Vh = torch.linalg.svd(weight_of(tensor, making).double() @ damped, full_matrices=False)
        chosen = slice(rank) if mode == "ipm" else slice(len(S) - rank, None)
        root = (S[chosen] / scale).sqrt().unsqueeze(1)
        return root * (Vh @ inverse)[chosen], root * U.T[chosen]

    return making.once(("corda", mode, tensor.site, rank, scale), make)["AB".index(tensor.part)]


def _inverted(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The moment with as much of its mean variance on the diagonal as its inverse needs, and that inverse."""
    import torch

    one = torch.eye(len(moment), dtype=moment.dtype)
    damping = 0.01 * moment.diagonal().mean()
    while True:
        damped = moment + damping * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            return damped, inverse
        damping = 2 * damping


def _lora_ga(tensor: TensorSpec, making: Making, gamma: float) -> Tensor:
    import torch

    assert tensor.site is not None
    rank, site = tensor.shape[0], tensor.site

    def make() -> tuple[Tensor, Tensor]:
        gradient = making.gradients[site]
        if 2 * rank > min(gradient.shape):
            raise SpecError(f"r: twice {rank} is more than the {min(gradient.shape)} ranks of W at {site}")
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        factor = len(gradient) ** 0.25 / sqrt(gamma)
        return factor * Vh[:rank], factor * U.T[rank : 2 * rank]

    return making.once(("lora-ga", site, rank, gamma), make)["AB".index(tensor.part)]


METHODS = (
    Method("eva", "arXiv 2410.07170", 3e-4, eva),
    Method("corda", "arXiv 2406.05223", 1e-4, corda),
    Method("lora-ga", "arXiv 2407.05000", 1e-4, lora_ga),
)
STARTS = (Start("principal", _principal), Start("corda", _corda), Start("lora-ga", _lora_ga))

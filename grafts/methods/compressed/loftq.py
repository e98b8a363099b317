"""LoftQ (Li et al. 2023, arXiv 2310.08659): a LoRA that starts by making up for what quantisation took from W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.compressed.quantisation import Quantisation
from polygraft.grafts.methods.declare import Method, Start
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections, strength, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def loftq(
    r: Rank = 8,
    alpha: Alpha = 8.0,
    at: Projections = "linear",
    dropout: Dropout = 0.0,
    iterations: int = 1,
    bits: int = 4,
) -> tuple[Slot, ...]:
    """LoftQ: y += s B A x beside a quantised W, where s B A starts as the best rank-r approximation of W - Q_T, and Q_T
    is what T = `iterations` alternations between quantising and approximating leave (Li et al. 2023, arXiv 2310.08659,
    eq. 7 to 9).

    Q_T is the backbone's, which all grafts share: `up --quantise nf4` has that of one iteration, whatever the rank, and
    `up --quantise loftq-R-T` that of rank R and T iterations. A graft of others than its backbone's is refused.

    Deviations: in `bits` of the backbone, which is NF4's 4; 2 bits, and mixed ones, are refused. The paper has no s.

    Choose when: the backbone lies in 4 bits and a LoRA is to start from what it was before. A backbone of several
    iterations is nearer to W with such a graft, and further from it bare or with another. On a backbone that is not
    quantised there is nothing to make up for; take lora.
    """
    if iterations < 1:
        raise SpecError(f"peft: loftq.iterations: {iterations} is not a count; give at least 1")
    if bits != 4:
        raise SpecError(f"peft: loftq.bits: {bits}; a quantised backbone is in NF4, whose weights have 4; give 4")
    start = DeclRef("loftq", (("iterations", iterations),) if iterations > 1 else ())
    return (Branch(at=on_projections(at), rank=r, scale=alpha / max(r, 1), dropout=dropout, start=start),)


def _residual(tensor: TensorSpec, making: Making, iterations: int = 1) -> Tensor:
    from torch import linalg

    rank, scale, site = tensor.shape[0], strength(tensor, making), tensor.site
    if making.backbone.quantise is None:
        raise SpecError("peft: loftq makes up for a quantised backbone, and this one is not; use lora or pissa")
    own = Quantisation.of(making.backbone.quantise)
    if (own.iterations, own.iterations > 1 and own.rank) != (iterations, iterations > 1 and rank):
        has = f"{own.iterations} iterations of rank {own.rank}" if own.iterations > 1 else "1 iteration"
        raise SpecError(
            f"peft: loftq.iterations: {iterations} of rank {rank}; this backbone's W, which all grafts share, was "
            f"quantised by {has} ({making.backbone.quantise}), and each further one quantises W - s B A anew: "
            f"give that, or start the service with --quantise loftq-{rank}-{iterations}"
        )

    def make() -> tuple[Tensor, Tensor]:
        assert site is not None
        plain = making.once("unquantised", making.backbone.unquantised)
        lost = plain.weight(site).cpu() - weight_of(tensor, making)
        U, S, Vh = linalg.svd(lost, full_matrices=False)
        root = (S[:rank] / scale).sqrt().unsqueeze(1)
        return root * Vh[:rank], root * U.T[:rank]

    return making.once(("loftq", site, rank, scale), make)["AB".index(tensor.part)]


METHODS = (Method("loftq", "arXiv 2310.08659", 3e-4, loftq, quantised=True),)
STARTS = (Start("loftq", _residual),)

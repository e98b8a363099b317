"""LoftQ (Li et al. 2023, arXiv 2310.08659): a LoRA that starts by making up for what quantisation took from W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, Start
from polygraft.grafts.methods.reparameterised.spectral import on_projections, strength, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def loftq(
    r: int = 8, alpha: float = 8.0, at: str = "linear", dropout: float = 0.0, iterations: int = 1, bits: int = 4
) -> tuple[Slot, ...]:
    """LoftQ: y += s B A x beside a quantised W, where s B0 A0 is the best rank-r approximation of W - Q(W) (Li et al.
    2023, arXiv 2310.08659, algorithm 1 with T = 1).

    Deviations: one of the algorithm's `iterations`, since Q is the backbone's, which all grafts share: each further one
    quantises W - s B A anew, another Q for every job. In `bits` of the backbone, which is NF4's 4; others are refused.

    Choose when: the backbone lies in NF4 and a LoRA is to start from what it was before. On a backbone that is not
    quantised there is nothing to make up for; take lora.
    """
    if iterations != 1:
        raise SpecError(
            f"peft: loftq.iterations: {iterations}; each after the first quantises W - s B A anew, and all grafts "
            "share the backbone's Q; give 1"
        )
    if bits != 4:
        raise SpecError(f"peft: loftq.bits: {bits}; a quantised backbone is in NF4, whose weights have 4; give 4")
    start = DeclRef("loftq")
    return (Branch(at=on_projections(at), rank=r, scale=alpha / max(r, 1), dropout=dropout, start=start),)


def _residual(tensor: TensorSpec, making: Making) -> Tensor:
    from torch import linalg

    rank, scale, site = tensor.shape[0], strength(tensor, making), tensor.site
    if making.backbone.quantise is None:
        raise SpecError("peft: loftq makes up for a quantised backbone, and this one is not; use lora or pissa")

    def make() -> tuple[Tensor, Tensor]:
        assert site is not None
        plain = making.once("unquantised", making.backbone.unquantised)
        lost = plain.weight(site).cpu() - weight_of(tensor, making)
        U, S, Vh = linalg.svd(lost, full_matrices=False)
        root = (S[:rank] / scale).sqrt().unsqueeze(1)
        return root * Vh[:rank], root * U.T[:rank]

    return making.once(("loftq", site, rank, scale), make)["AB".index(tensor.part)]


METHODS = (Method("loftq", "arXiv 2310.08659", 3e-4, loftq),)
STARTS = (Start("loftq", _residual),)

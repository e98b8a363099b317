"""LoftQ: a LoRA that starts at what quantisation took from W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, Start
from polygraft.grafts.methods.reparameterised.spectral import on_projections, strength, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def loftq(r: int = 8, alpha: float = 8.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    """LoRA beside a quantised backbone that starts at what quantisation took from W: s B0 A0 is the best rank-r
    approximation of W - Q(W) (Li et al. 2023, arXiv 2310.08659, algorithm 1 with T = 1).

    Deviations: One step of the algorithm: more would change Q(W), which all grafts of the backbone share.

    Choose when: the backbone is in 4 bits and its loss before training is worse than the plain one's. On a backbone
    that is not quantised it is refused.
    """
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


METHODS = (Method("loftq", "arXiv 2310.08659", 3e-4, loftq, quantised=True),)
STARTS = (Start("loftq", _residual),)

"""LoRA: y += (alpha / r) B A x, with A random and B zero at the start (Hu et al. 2021, arXiv 2106.09685, section
4.1)."""

from math import sqrt

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Branch, Slot


def lora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout),)


def rslora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    """Rank-stabilised scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    return (Branch(at=at, rank=r, scale=alpha / sqrt(max(r, 1)), dropout=dropout),)


METHODS = (
    Method("lora", "arXiv 2106.09685", 3e-4, lora),
    Method("rslora", "arXiv 2312.03732", 3e-4, rslora),
)

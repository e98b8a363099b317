"""DoRA: W' = m (W + BA) / ||W + BA||_row, the norm outside the gradient (Liu et al. 2024, arXiv 2402.09353, eq. 5 and
11)."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.lora import lora
from polygraft.grafts.spec import Norm, Slot


def dora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    return (*lora(r, alpha, at, dropout), Norm(at=at))


METHODS = (Method("dora", "arXiv 2402.09353", 3e-4, dora),)

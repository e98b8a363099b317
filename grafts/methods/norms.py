"""Norms and what stands beside every operation: LN-tuning trains the norms' scales alone (Zhao et al. 2024, arXiv
2312.11420, section 3), as factors g on the frozen ones, w' = w g. SSF scales and shifts the output of every operation,
y = g y + b (Lian et al. 2022, arXiv 2210.08823, eq. 5).
"""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Affine, Slot


def ln_tuning(at: str = "norm.*") -> tuple[Slot, ...]:
    return (Affine(at=at, scale=True, shift=False),)


def ssf(at: str = "linear|norm.*") -> tuple[Slot, ...]:
    return (Affine(at=at, scale=True, shift=True),)


METHODS = (
    Method("ln-tuning", "arXiv 2312.11420", 1e-3, ln_tuning),
    Method("ssf", "arXiv 2210.08823", 1e-3, ssf),
)

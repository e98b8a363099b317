"""BitFit: only biases are trained; where a projection has none, a zero one is added (Ben Zaken et al. 2022, arXiv
2106.10199). BEFT: only those of the value projections (Huang et al. 2025, arXiv 2509.15974)."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import Affine, Slot


def bitfit(at: str = "linear") -> tuple[Slot, ...]:
    return (Affine(at=at, scale=False, shift=True),)


def beft(at: str = "attn.v") -> tuple[Slot, ...]:
    return bitfit(at)


METHODS = (
    Method("bitfit", "arXiv 2106.10199", 3e-3, bitfit, aliases=("bias",)),
    Method("beft", "arXiv 2509.15974", 3e-3, beft),
)
PEFT = (
    Peft(
        kind="BEFT",
        method="beft",
        biases=False,
        idle={"init_weights": True},
        layered=False,
        own={"b": Kept("beft_bias", shape=(1, -1))},
    ),
)

"""Trained biases."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections
from polygraft.grafts.spec import Affine, Slot


def bitfit(at: Projections = "linear") -> tuple[Slot, ...]:
    """Only biases are trained, y + b; where a projection has none, a zero one is added (Ben Zaken et al. 2022, arXiv
    2106.10199, eq. 1 to 5 without the queries, keys and values, which have no number).

    Deviations: By default biases of the projections, where the paper trains those of the norms, too:
    `bitfit(at=linear|norm.*)`, and the classifier. On backbones without biases they are new numbers.

    Choose when: a graft must be tiny and merge. It does less on large decoders than on the paper's BERT.
    """
    return (Affine(at=at, scale=False, shift=True),)


def beft(at: str = "attn.v") -> tuple[Slot, ...]:
    """Only the biases of the value projections are trained, a (V + b) = a V + b behind attention's weights a (Huang et
    al. 2025, arXiv 2509.15974, eq. 1).

    Deviations: None known.

    Choose when: even `bitfit` is too large: one vector a layer.
    """
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

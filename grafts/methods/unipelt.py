"""UniPELT of a LoRA and an adapter: every row opens each of them by a gate of its own, W x + G_L B A x on queries and
values, h + G_A B act(A h) after the feed-forward, with G = sigmoid(W_G input) (Mao et al. 2022, arXiv 2110.07577,
section 3.1).

As in the paper a gate reads its module's direct input; it is the row's own, where AdapterHub takes the mean over the
sequence, which a decoder does not know while it writes. The prefix is left out: its gate would stand inside attention.
"""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Branch, Slot


def unipelt_al(
    r: int = 8, size: int = 48, at: str = "attn.[qv]", adapter: str = "ffn.out", scale: float = 1.0
) -> tuple[Slot, ...]:
    """`scale` is LoRA's beside its gate, which replaces it in the paper."""
    return (
        Branch(at=at, rank=r, scale=scale, gate="sigmoid"),
        Branch(at=adapter, rank=size, act="relu", tap="output", gate="sigmoid"),
    )


METHODS = (Method("unipelt-al", "arXiv 2110.07577", 3e-4, unipelt_al),)

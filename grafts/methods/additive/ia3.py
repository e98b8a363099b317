"""(IA)3: learned scales on keys, values and the input of the last feed-forward projection (Liu et al. 2022, arXiv
2205.05638)."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import Affine, Slot


def ia3(at: str = "attn.[kv]", feedforward: str = "ffn.down") -> tuple[Slot, ...]:
    """`at` is scaled on its output, `feedforward` on its input; either may be empty."""
    after = (Affine(at=at, scale=True, shift=False),) if at else ()
    return after + ((Affine(at=feedforward, scale=True, shift=False, side="in"),) if feedforward else ())


METHODS = (Method("ia3", "arXiv 2205.05638", 5e-3, ia3),)
PEFT = (
    Peft(
        kind="IA3",
        method="ia3",
        biases=False,
        conv1d=True,
        idle={"init_ia3_weights": True},
        sides={"at": ("target_modules", ()), "feedforward": ("feedforward_modules", ("down_proj",))},
        layered=False,
        own={"g": Kept("ia3_l", shape=lambda slot: (1, -1) if slot.side == "in" else (-1, 1), rows=True)},
    ),
)

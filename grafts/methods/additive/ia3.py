"""(IA)3: trained factors on keys, values and the input of the last feed-forward projection."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import Affine, Slot


def ia3(at: str = "attn.[kv]", feedforward: str = "ffn.down") -> tuple[Slot, ...]:
    """Trained factors on keys, on values and on what the last projection of the feed-forward reads: l_k * k, l_v * v,
    (l_ff * h) W (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    `at` is scaled on its output, `feedforward` on its input; either may be empty.

    Deviations: None known in the method. The paper also adds an unlikelihood and a length-normalised loss (T-Few),
    which are not here.

    Choose when: a graft may have almost no parameters, and must merge and stack with others. It needs a high learning
    rate and reaches less than LoRA where much is to be learned.
    """
    after = (Affine(at=at, scale=True, shift=False),) if at else ()
    return after + ((Affine(at=feedforward, scale=True, shift=False, side="in"),) if feedforward else ())


METHODS = (Method("ia3", "arXiv 2205.05638", 5e-3, ia3),)
PEFT = (
    Peft(
        kind="IA3",
        method="ia3",
        biases=False,
        conv1d=True,
        separable=True,
        idle={"init_ia3_weights": True},
        sides={"at": ("target_modules", ()), "feedforward": ("feedforward_modules", ("down_proj",))},
        layered=False,
        own={"g": Kept("ia3_l", shape=lambda slot: (1, -1) if slot.side == "in" else (-1, 1), rows=True)},
    ),
)

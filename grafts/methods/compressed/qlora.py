"""QLoRA: LoRA beside a backbone in NF4."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.lora import lora
from polygraft.grafts.spec import Slot


def qlora(r: Rank = 64, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.1) -> tuple[Slot, ...]:
    """LoRA beside a backbone in NF4 with double quantisation, the products in the compute type (Dettmers et al. 2023,
    arXiv 2305.14314, eq. 5): the same graft as `lora`, with the paper's sizes, and refused where the backbone is not
    quantised.

    Deviations: None known in the arithmetic: it is PEFT's on transformers' 4-bit model. Paged optimisers are not here,
    as optimiser states are the graft's own and small.

    Choose when: the backbone does not fit in 16 bits: start the service with `polygraft up --quantise nf4`. Every graft
    of such a service is trained so.
    """
    return lora(r, alpha, at, dropout)


METHODS = (Method("qlora", "arXiv 2305.14314", 2e-4, qlora, quantised=True),)

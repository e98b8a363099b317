"""QLoRA: LoRA beside a backbone in NF4."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.reparameterised.lora import lora
from polygraft.grafts.spec import Slot


def qlora(r: int = 64, alpha: float = 16.0, at: str = "linear", dropout: float = 0.1) -> tuple[Slot, ...]:
    return lora(r, alpha, at, dropout)


METHODS = (Method("qlora", "arXiv 2305.14314", 2e-4, qlora, quantised=True),)

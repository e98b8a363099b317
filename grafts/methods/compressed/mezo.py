"""MeZO: training by forward passes alone (Malladi et al. 2023, arXiv 2305.17333, algorithm 1). A way to train, written
beside what is trained: `lora + mezo(0.01)`; `trainers/mezo.py` does it."""

from polygraft.grafts.methods.declare import Hook, Method
from polygraft.grafts.spec import DeclRef, Slot, SpecError


def mezo(eps: float = 1e-2) -> tuple[Slot, ...]:
    """`eps` is how far the tensors are moved along a random direction, there and back (1e-2 for LoRA, 1e-1 for
    prefixes in the paper's appendix)."""
    if eps <= 0:
        raise SpecError(f"peft: eps: {eps} is not a distance; give a positive number")
    return ()


def _hooks(eps: float = 1e-2) -> tuple[DeclRef, ...]:
    return (DeclRef("mezo", (("eps", eps),)),)


METHODS = (Method("mezo", "arXiv 2305.17333", 1e-4, mezo, hooks=_hooks),)
HOOKS = (Hook("mezo", forward_only=True),)

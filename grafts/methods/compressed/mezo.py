"""MeZO: training by forward passes alone (`trainers/mezo.py` does it)."""

from polygraft.grafts.methods.declare import Hook, Method
from polygraft.grafts.spec import DeclRef, Slot, SpecError


def mezo(eps: float = 1e-2) -> tuple[Slot, ...]:
    """A way to train, written beside what is trained, `lora + mezo(0.01)`: by forward passes alone, the gradient along
    a random direction z being (L(theta + eps z) - L(theta - eps z)) / (2 eps) (Malladi et al. 2023, arXiv 2305.17333,
    eq. 1 and algorithm 1).

    `eps` is how far the tensors are moved along z, there and back (1e-2 for LoRA, 1e-1 for prefixes in the paper's
    appendix).

    Deviations: None known. Both losses come from one forward with two residents, and z is a hash of the job's seed and
    step.

    Choose when: memory for a backward is missing. It needs many more steps, and a low rate.
    """
    if eps <= 0:
        raise SpecError(f"peft: eps: {eps} is not a distance; give a positive number")
    return ()


def _hooks(eps: float = 1e-2) -> tuple[DeclRef, ...]:
    return (DeclRef("mezo", (("eps", eps),)),)


METHODS = (Method("mezo", "arXiv 2305.17333", 1e-4, mezo, hooks=_hooks),)
HOOKS = (Hook("mezo", forward_only=True),)

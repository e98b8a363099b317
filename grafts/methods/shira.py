"""Sparse updates at entries chosen without data: SHiRA, PaFi, Super-Tuning."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Branch, Call, Slot, Sparse, SpecError


def shira(r: int = 32, at: str = "linear") -> tuple[Slot, ...]:
    """y += S x with r (in + out) random entries, as many as a LoRA of rank r has (Bhardwaj et al. 2024, arXiv
    2406.13175, section 3.1, SHiRA-Rand)."""
    return (Sparse(at=at, rank=r),)


def pafi(density: float = 0.005, at: str = "linear") -> tuple[Slot, ...]:
    """The entries of the smallest |W|, the same share of every matrix (Liao et al. 2023, arXiv 2305.16742, section
    3.1)."""
    return (Sparse(at=at, density=density, pick=Call("smallest_entries")),)


def supertuning(
    sparsity: float = 0.99, end: str = "top", r: int = 0, alpha: float = 0.0, at: str = "linear"
) -> tuple[Slot, ...]:
    """The entries of the largest |W| (`end` top) or the smallest (bottom), with a LoRA of rank r beside it if there is
    one ("Supra"; alpha 2 r where 0) (arXiv 2607.09287, as PEFT has it)."""
    if end not in ("top", "bottom"):
        raise SpecError(f"end: {end!r} is neither top nor bottom")
    pick = Call("largest_entries" if end == "top" else "smallest_entries")
    own = (Sparse(at=at, density=1 - sparsity, pick=pick),)
    return own + ((Branch(at=at, rank=r, scale=(alpha or 2 * r) / r),) if r else ())


METHODS = (
    Method("shira", "arXiv 2406.13175", 3e-4, shira),
    Method("pafi", "arXiv 2305.16742", 3e-4, pafi),
    Method("supertuning", "arXiv 2607.09287", 3e-4, supertuning, aliases=("super-tuning",)),
)

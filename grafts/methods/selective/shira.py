"""Sparse updates at entries chosen without data: SHiRA, PaFi, Super-Tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, SiteShape
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import Branch, DeclRef, Slot, Sparse, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def shira(r: int = 32, at: str = "linear") -> tuple[Slot, ...]:
    """y += S x with r (in + out) random entries, as many as a LoRA of rank r has (Bhardwaj et al. 2024, arXiv
    2406.13175, section 3.1, SHiRA-Rand)."""
    return (Sparse(at=at, rank=r),)


def pafi(density: float = 0.005, at: str = "linear") -> tuple[Slot, ...]:
    """The entries of the smallest |W|, the same share of every matrix (Liao et al. 2023, arXiv 2305.16742, section
    3.1)."""
    return (Sparse(at=at, density=density, pick=DeclRef("smallest_entries")),)


def supertuning(
    sparsity: float = 0.99, end: str = "top", r: int = 0, alpha: float = 0.0, at: str = "linear"
) -> tuple[Slot, ...]:
    """The entries of the largest |W| (`end` top) or the smallest (bottom), with a LoRA of rank r beside it if there is
    one ("Supra"; alpha 2 r where 0) (arXiv 2607.09287, as PEFT has it)."""
    if end not in ("top", "bottom"):
        raise SpecError(f"end: {end!r} is neither top nor bottom")
    pick = DeclRef("largest_entries" if end == "top" else "smallest_entries")
    own = (Sparse(at=at, density=1 - sparsity, pick=pick),)
    return own + ((Branch(at=at, rank=r, scale=(alpha or 2 * r) / r),) if r else ())


METHODS = (
    Method("shira", "arXiv 2406.13175", 3e-4, shira),
    Method("pafi", "arXiv 2305.16742", 3e-4, pafi),
    Method("supertuning", "arXiv 2607.09287", 3e-4, supertuning, aliases=("super-tuning",)),
)


def _flat(index: Tensor, place: SiteShape) -> Tensor:
    return index[:, 0] * place.d_in + index[:, 1]


def _pairs(flat: Tensor, place: SiteShape) -> Tensor:
    import torch

    return torch.stack([flat // place.d_in, flat % place.d_in], dim=1)


_STARTS: dict[str, object] = {"init_weights": True}
PEFT = (
    Peft(
        kind="SHIRA",
        method="shira",
        biases=False,
        names={"r": ("r", 32)},
        idle=_STARTS | {"mask_type": "random", "random_seed": None},
        layered=False,
        own={
            "w": Kept("shira_weight", shape=(-1,)),
            "i": Kept("shira_indices", turned=(0, 1), dtype="int32"),
        },
    ),
    Peft(
        kind="SUPERTUNING",
        method="supertuning",
        biases=False,
        names={"sparsity": ("sparsity", 0.99)},
        fields=lambda r, alpha, end, **_: {
            "r": r or None,
            "lora_alpha": (alpha or 2 * r) or None,
            "select_top": end == "top",
        },
        arguments=lambda config: {
            "r": config.get("r") or 0,
            "alpha": config.get("lora_alpha") or 0,
            "end": "top" if config.get("select_top", True) else "bottom",
        },
        reads=("r", "lora_alpha", "select_top"),
        needs={"save_precomputed_indices": True},
        idle=_STARTS | {"lora_dropout": None},
        layered=False,
        own={
            "w": Kept("supertuning_values", shape=(-1,)),
            "i": Kept("supertuning_indices", coded=(_flat, _pairs), dtype="int32"),
            "A": Kept("supertuning_lora_A.weight"),
            "B": Kept("supertuning_lora_B.weight", turned=(0, 1)),
        },
    ),
)

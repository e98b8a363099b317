"""Sparse updates at entries chosen without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method, SiteShape
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Density, Projections, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot, Sparse, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def shira(r: Rank = 32, at: Projections = "linear") -> tuple[Slot, ...]:
    """y += S x with random entries of W trained, r (in + out) of them, as many as a LoRA of rank r has (Bhardwaj et al.
    2024, arXiv 2406.13175, section 3.1, SHiRA-Rand).

    Deviations: Of the paper's masks the random one; for others see `pafi`, `supertuning` (magnitude) and `fishmask`
    (gradients).

    Choose when: several grafts are to be added up or switched fast: sparse changes rarely meet.
    """
    return (Sparse(at=at, rank=r),)


def pafi(density: Density = 0.005, at: Projections = "linear") -> tuple[Slot, ...]:
    """The entries of the smallest |W| are trained, the same share of every matrix: a mask without data, the same for
    all tasks (Liao et al. 2023, arXiv 2305.16742, section 3.1).

    Deviations: None known. The paper shares one mask among all tasks; so does the rule here.

    Choose when: a sparse change is wanted without a look at data, or grafts are to share one mask.
    """
    return (Sparse(at=at, density=density, pick=DeclRef("smallest_entries")),)


def supertuning(
    sparsity: float = 0.99, end: str = "top", r: int = 0, alpha: float = 0.0, at: Projections = "linear"
) -> tuple[Slot, ...]:
    """The entries of the largest |W| are trained (`end` top) or of the smallest (bottom), with a LoRA of rank r beside
    them if there is one, "Supra" (arXiv 2607.09287, as PEFT 0.21 has it).

    `sparsity` is the share that is not trained; alpha is 2 r where 0.

    Deviations: Held against PEFT and not against the paper's text. By the authors' README Super's own score of an entry
    is |W| times the norm of what it multiplies; |W| alone is its baseline.

    Choose when: PEFT's folders of it are to be served, or `pafi` is to be tried from the other end.
    """
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

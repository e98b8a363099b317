"""LoRA with a part that stays where it starts, or a rate of its own for a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.lora import lora
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.sizes import TensorSpec


def lora_fa(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0, correct: int = 0
) -> tuple[Slot, ...]:
    """LoRA with A random and frozen and B alone trained (Zhang et al. 2023, arXiv 2308.03303, section 3 of its first
    version).

    With `correct` 1, B's gradient is that of the low-rank update nearest to the full gradient, (1 / s^2) (A A^T)^-1 dB,
    as in PEFT's optimiser. What is kept for the backward is A x [r] and not x. That saves less here than in the paper,
    since most of what projections read is made again in LoRA's backward, too: on SmolLM2 in bf16 a step holds 0.90 of
    LoRA's activations (`benchmarks/activation_memory.py`), all but the inputs of attn.o.

    Deviations: None known in the update.

    Choose when: activations are the limit, and a tenth less of them matters more than a trained A.
    """
    form = DeclRef("part-frozen", (("part", "A"), ("A", "kaiming"), ("B", "zero")))
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, form=form),)


def _correcting(r: int = 8, alpha: float = 16.0, correct: int = 0, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("lora-fa", (("scale", alpha / max(r, 1)),)),) if correct else ()


def lora_plus(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0, ratio: float = 16.0
) -> tuple[Slot, ...]:
    """LoRA whose B learns `ratio` times as fast as A (Hayou et al. 2024, arXiv 2402.12354, section 4 and theorem 1).

    Deviations: None known in the method; PEFT's separate rate for embeddings has no use here. The default ratio is what
    the paper finds for RoBERTa with A at 0 and B random; with B at 0, as here, it finds 4 to 8, and 2 to 4 on Llama-7B.

    Choose when: the model is wide and LoRA learns slowly. It is a way to train LoRA: the graft is LoRA's.
    """
    return lora(r, alpha, at, dropout)


def _faster(ratio: float = 16.0, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("lora-plus", (("ratio", ratio),)),)


def _own(slot: Branch, place: SiteShape, part: str, A: str, B: str) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank, place.d_in), A, trained=part != "A"),
        "B": TensorDecl((slot.rank, place.d_out), B, trained=part != "B"),
    }


def _operands(
    slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, part: str, A: str, B: str
) -> Mapping[str, Tensor]:
    return {"A": values["A"], "B": values["B"]}


def _corrected(values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scale: float) -> None:
    """dB [rank, out] becomes (A A^T)^-1 dB / s^2 where A is frozen."""
    from torch import linalg

    for name, gradient in gradients.items():
        stem, _, part = name.rpartition(".")
        if part == "B" and f"{stem}.A" in values and f"{stem}.A" not in gradients:
            A = values[f"{stem}.A"]
            gradient.copy_(linalg.pinv(A @ A.T) @ gradient / scale**2)


def _rate(tensor: TensorSpec, ratio: float) -> float:
    return ratio if tensor.part == "B" else 1.0


METHODS = (
    Method("lora-fa", "arXiv 2308.03303", 1e-3, lora_fa, hooks=_correcting),
    Method("lora-plus", "arXiv 2402.12354", 1e-4, lora_plus, aliases=("loraplus",), hooks=_faster),
)
PARAMETRIZATIONS = (Parametrization("part-frozen", _operands, _own, kept=("A", "B")),)
HOOKS = (Hook("lora-fa", gradient=_corrected), Hook("lora-plus", rate=_rate))

"""LoRAs whose factors are made block by block.

- MiSS (Kang & Yin 2024, arXiv 2409.15371): y += D^T sum_j x_j over the pieces x_j of x of width r, so that all
  pieces share D [r, out]; `mini` makes D periodic in the output. Bat (the same paper): dW = W_b D_b + D_b over
  blocks of r x r, which needs W.
- GraLoRA (Jung et al. 2025, arXiv 2505.20355): W in k x k blocks with a LoRA of rank r / k each.
- BD-LoRA (arXiv 2510.23346): LoRA with B block-diagonal at `at`, and A at `rows`, so that both can be cut
  with W over several devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.kronecker import divided
from polygraft.grafts.methods.reparameterised.lora import LORA_HARMLESS, LORA_IDLE, LORA_PATTERNS
from polygraft.grafts.spec import Branch, DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def miss(r: Rank = 64, mini: int = 0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """y += D^T sum_j x_j over the pieces x_j of x of width r, so that all pieces share one matrix D [r, out] (Kang &
    Yin 2024, arXiv 2409.15371, eq. 4 to 7; first called Bone).

    `mini` is the period of D in the output, 0 for none.

    Deviations: None known; the authors' fused kernels are not here.

    Choose when: LoRA's memory and time are too much: it has one matrix in place of two and no random start.
    """
    return (Branch(at=at, rank=r, dropout=dropout, form=DeclRef("miss", (("mini", mini),))),)


def bat(r: Rank = 16, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = W_b D_b + D_b over blocks of r x r, an update that reads W itself (Kang & Yin 2024, arXiv 2409.15371, the
    variant Bat of its earlier versions).

    Deviations: Held against PEFT's init_weights="bat"; the paper's version 12 leaves it out.

    Choose when: MiSS converges too slowly. It makes a dense dW at each site in every step, which takes far more time
    and memory.
    """
    return (Delta(at=at, form=DeclRef("bat", (("r", r),))),)


def gralora(
    r: Rank = 32, alpha: Alpha = 64.0, k: int = 2, at: Projections = "linear", dropout: Dropout = 0.0
) -> tuple[Slot, ...]:
    """W in k x k blocks with a LoRA of rank r / k each, so that the whole has up to k times LoRA's rank at its number
    of parameters (Jung et al. 2025, arXiv 2505.20355, eq. 5).

    Deviations: The paper's hybrid with a plain LoRA beside it is the union `gralora + lora`.

    Choose when: LoRA of a high rank overfits or saturates; k divides the rank and the widths. It computes with r k
    ranks.
    """
    if k < 1 or r % k:
        raise SpecError(f"peft: gralora.k: {k} does not divide the rank {r}; give a divisor")
    return (Branch(at=at, rank=r * k, scale=alpha / max(r, 1), dropout=dropout, form=DeclRef("gralora", (("k", k),))),)


def bdlora(
    r: Rank = 8,
    alpha: Alpha = 16.0,
    blocks: int = 2,
    at: str = "attn.[qkv]|ffn.gate|ffn.up",
    rows: str = "attn.o|ffn.down",
) -> tuple[Slot, ...]:
    """LoRA with B block-diagonal at the sites `at`, and A at `rows`, so that both factors can be cut with W over
    several devices without talking (arXiv 2510.23346).

    `at` and `rows` may be empty.

    Deviations: Held against PEFT; as a graft is on one device here, the blocks save nothing yet.

    Choose when: the graft is to be served elsewhere with tensor parallelism.
    """
    if blocks < 1 or r % blocks:
        raise SpecError(f"peft: bdlora.blocks: {blocks} does not divide the rank {r}; give a divisor")
    return tuple(
        Branch(at=sites, rank=r, scale=alpha / max(r, 1), form=DeclRef("bdlora", (("blocks", blocks), ("part", part))))
        for sites, part in ((at, "B"), (rows, "A"))
        if sites
    )


def _miss_own(slot: Branch, place: SiteShape, mini: int) -> Parts:
    if slot.rank > place.d_in:
        raise SpecError(f"r: {slot.rank} is more than the {place.d_in} inputs of {place.name}")
    if mini < 0 or (mini and place.d_out % mini):
        raise SpecError(f"mini: {mini} does not divide the {place.d_out} outputs of {place.name}")
    return {"D": TensorDecl((slot.rank, mini or place.d_out))}


def _miss(slot: Branch, values: Values, lowering: Lowering, mini: int) -> Values:
    import torch

    place, D = lowering.place, values["D"]
    pieces = torch.eye(slot.rank, dtype=D.dtype, device=D.device).repeat(1, -(-place.d_in // slot.rank))
    return {"A": pieces[:, : place.d_in], "B": D.repeat(1, place.d_out // D.shape[1])}


def _bat_own(slot: Delta, place: SiteShape, r: int) -> Parts:
    return {"D": TensorDecl((divided(place, r)[1], r, r))}


def _bat(slot: Delta, values: Values, lowering: Lowering, r: int) -> Values:
    D, W = values["D"], lowering.weight()
    blocks = W.to(D.dtype).view(len(D), r, -1, r).transpose(1, 2)  # [out / r, in / r, r, r]
    made = blocks @ D.unsqueeze(1) + D.unsqueeze(1)
    return {"W": made.transpose(1, 2).reshape(W.shape)}


def _gralora_own(slot: Branch, place: SiteShape, k: int) -> Parts:
    d_in, d_out = divided(place, k)
    r = slot.rank // k
    return {
        "A": TensorDecl((k, r, d_in), DeclRef("uniform", (("bound", 1 / sqrt(d_in)),))),
        "B": TensorDecl((k, r, d_out)),
    }


def _gralora(slot: Branch, values: Values, lowering: Lowering, k: int) -> Values:
    """Rank (n, j, s) of the k r ones reads inputs n, by the s-th of the r / k ranks of A_n that are for outputs j, and
    writes outputs j, by rank (n, s) of B_j."""
    import torch

    A, B = values["A"], values["B"]
    each = A.shape[1] // k
    into = A.view(k, k, each, -1)  # [n, j, s, in / k]
    out = B.view(k, k, each, -1).transpose(0, 1)  # [n, j, s, out / k]
    eye = torch.eye(k, dtype=A.dtype, device=A.device)
    wide_A = torch.einsum("njsi,nm->njsmi", into, eye)
    wide_B = torch.einsum("njso,jm->njsmo", out, eye)
    return {"A": wide_A.reshape(slot.rank, -1), "B": wide_B.reshape(slot.rank, -1)}


def _bdlora_own(slot: Branch, place: SiteShape, blocks: int, part: str) -> Parts:
    width, rank = place.d_in if part == "A" else place.d_out, slot.rank // blocks
    if width % blocks:
        raise SpecError(f"blocks: {blocks} does not divide the width {width} of {place.name}")
    start = DeclRef("uniform", (("bound", 1 / sqrt(width // blocks)),)) if part == "A" else "zero"
    whole = {"A": TensorDecl((slot.rank, place.d_in), "kaiming"), "B": TensorDecl((slot.rank, place.d_out))}
    return {**whole, part: TensorDecl((blocks, rank, width // blocks), start)}


def _bdlora(slot: Branch, values: Values, lowering: Lowering, blocks: int, part: str) -> Values:
    """Block i of the ranks meets block i of the inputs (A) or of the outputs (B)."""
    import torch

    whole = torch.block_diag(*values[part])  # type: ignore[no-untyped-call]
    return {**values, part: whole}


METHODS = (
    Method("miss", "arXiv 2409.15371", 1e-4, miss),
    Method("bat", "arXiv 2409.15371", 1e-4, bat),
    Method("gralora", "arXiv 2505.20355", 2e-4, gralora),
    Method("bdlora", "arXiv 2510.23346", 3e-4, bdlora),
)
PARAMETRIZATIONS = (
    Parametrization("miss", _miss, _miss_own),
    Parametrization("bat", _bat, _bat_own),
    Parametrization("gralora", _gralora, _gralora_own),
    Parametrization("bdlora", _bdlora, _bdlora_own),
)


def _columns(slot: Branch) -> tuple[int, int]:
    """PEFT's B, whose blocks lie below one another."""
    assert slot.form is not None
    arguments = slot.form.keywords()
    blocks = arguments["blocks"] if arguments["part"] == "B" else 1
    assert isinstance(blocks, int)
    return -1, slot.rank // blocks


PEFT = (
    Peft(
        kind="MISS",
        method="miss",
        names={"r": ("r", 64), "dropout": ("miss_dropout", 0.0)},
        fields=lambda mini, **_: {"init_weights": "mini", "mini_r": mini} if mini else {},
        arguments=lambda config: {"mini": config.get("mini_r") if config.get("init_weights") == "mini" else 0},
        reads=("init_weights", "mini_r"),
        own={"D": Kept("miss_block")},
    ),
    Peft(
        kind="MISS",
        method="bat",
        names={"r": ("r", 64)},
        fixed={"init_weights": "bat"},
        idle={"mini_r": 1, "miss_dropout": None},
        own={"D": Kept("miss_block")},
    ),
    Peft(
        kind="GRALORA",
        method="gralora",
        conv1d=True,
        names={"r": ("r", 32), "alpha": ("alpha", 64), "k": ("gralora_k", 2), "dropout": ("gralora_dropout", 0.0)},
        idle={"init_weights": True},
        own={"A": Kept("gralora_A", turned=(1, 2)), "B": Kept("gralora_B")},
    ),
    Peft(
        kind="LORA",
        method="bdlora",
        conv1d=True,
        names={
            "r": ("r", 8),
            "alpha": ("lora_alpha", 8),
            "blocks": ("use_bdlora.nblocks", 1),
        },
        reads=("use_bdlora.target_modules_bd_b",),
        fixed={"use_bdlora": True, "use_dora": False, "use_rslora": False},
        needs={"use_bdlora.match_strict": True},
        idle=LORA_IDLE | {"lora_dropout": None},
        harmless=LORA_HARMLESS,
        sides={"at": ("target_modules", ()), "rows": ("use_bdlora.target_modules_bd_a", ())},
        patterns=LORA_PATTERNS,
        written=False,
        own={
            "A": Kept("lora_A.weight", shape=lambda slot: (slot.rank, -1)),
            "B": Kept("lora_B.weight", turned=(-2, -1), shape=_columns),
        },
    ),
)

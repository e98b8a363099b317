"""Prompts P that are made of other numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Rank, Rows, Width
from polygraft.grafts.spec import DeclRef, Slot, SpecError, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]
_EPS = 1e-5  # torch's own for a LayerNorm


def dpt(length: Rows = 100, r: Rank = 10) -> tuple[Slot, ...]:
    """A prompt as a product of two small matrices, P = A B with A [length, r] and B [r, hidden] (Xiao et al. 2023,
    arXiv 2310.10094, section 3).

    Deviations: Both factors start random, as in the paper; its choice of r by task is left to you.

    Choose when: a long prompt is wanted at the price of a short one: r (length + hidden) numbers.
    """
    return (Tokens(length=length, form=DeclRef("low-rank-rows", (("r", r), ("std", 1.0)))),)


def residual_prompt(length: Rows = 10, size: Width = 64) -> tuple[Slot, ...]:
    """P + LayerNorm(W_up relu(W_down P)): a prompt and what a small network shared by its rows makes of each
    (Razdaibiedina et al. 2023, arXiv 2305.03937, eq. 3 and 4).

    Deviations: None known. What is served is the sum.

    Choose when: prompt tuning is unstable over starts and rates, and short prompts are wanted.
    """
    if size < 1:
        raise SpecError(f"peft: size: {size} is not a size; give at least 1")
    return (Tokens(length=length, form=DeclRef("residual-prompt", (("size", size),))),)


def mpt(length: Rows = 100) -> tuple[Slot, ...]:
    """A prompt times a matrix of rank one, P * (u v^T) (Wang et al. 2023, arXiv 2303.02861, section 3), as PEFT's
    multitask prompt tuning holds it for one task.

    Deviations: The paper distils P from several source tasks first and then adapts u and v to a target; a job here
    trains P, u and v together, for its own task alone.

    Choose when: you have PEFT's folders of multitask prompt tuning of one task, or go on from one with `from`; else
    `prompt` says the same with fewer numbers.
    """
    return (Tokens(length=length, form=DeclRef("rank-one-prompt")),)


def pruned_prompt(length: Rows = 20, keep: float = 0.5, pieces: int = 16, keep_pieces: float = 0.5) -> tuple[Slot, ...]:
    """A prompt of which rows and then pieces of rows are masked on the way, those whose masks' gradients were smallest,
    and which trains on with what is left (after XPrompt: Ma et al. 2022, arXiv 2210.04457, eq. 2 to 4).

    `keep` of the rows outlive the first third of the steps, `keep_pieces` of their pieces the second. A masked row
    stays in its place as zeros.

    Deviations: XPrompt rewinds what is left to earlier values and trains it once more, by which it means to find
    lottery tickets; here training goes on from where it is, and hence the name. Masked rows still take context.

    Choose when: you want to see which virtual tokens matter; for quality `prompt` does as well.
    """
    for field, share in (("keep", keep), ("keep_pieces", keep_pieces)):
        if not 0 < share <= 1:
            raise SpecError(f"peft: {field}: {share} is outside (0, 1]")
    return (Tokens(length=length, form=DeclRef("pruned-prompt", (("pieces", pieces),))),)


def _pruning(length: int = 20, keep: float = 0.5, pieces: int = 16, keep_pieces: float = 0.5) -> tuple[DeclRef, ...]:
    return (DeclRef("pruned-prompt", (("keep", keep), ("keep_pieces", keep_pieces))),)


def _residual_own(slot: Tokens, place: SiteShape, size: int) -> Mapping[str, TensorDecl]:
    width = place.d_out
    return {
        "P": TensorDecl((slot.length, width), "embedded"),
        "A": TensorDecl((size, width), "kaiming"),
        "B": TensorDecl((size, width), "kaiming"),
        "g": TensorDecl((width,), "one"),
        "b": TensorDecl((width,)),
    }


def _residual(slot: Tokens, values: Values, lowering: Lowering, size: int) -> Values:
    from torch.nn import functional as F

    P = values["P"]
    made = (P @ values["A"].T).relu() @ values["B"]
    return {"p": P + F.layer_norm(made, made.shape[-1:], values["g"], values["b"], _EPS)}


def _rank_one_own(slot: Tokens, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "P": TensorDecl((slot.length, place.d_out), "embedded"),
        "u": TensorDecl((slot.length, 1), "one"),
        "v": TensorDecl((1, place.d_out), "one"),
    }


def _rank_one(slot: Tokens, values: Values, lowering: Lowering) -> Values:
    return {"p": values["P"] * (values["u"] * values["v"])}


def _masked_own(slot: Tokens, place: SiteShape, pieces: int) -> Mapping[str, TensorDecl]:
    """The prompt; masks of rows and of pieces, 1 or 0; and how much each has mattered so far."""
    if pieces < 1 or place.d_out % pieces:
        raise SpecError(f"peft: pieces: {pieces} does not divide an embedding's {place.d_out} numbers")
    rows, whole = (slot.length, 1), (slot.length, pieces)
    return {
        "P": TensorDecl((slot.length, place.d_out), "embedded"),
        "rows": TensorDecl(rows, "one", trained=False),
        "pieces": TensorDecl(whole, "one", trained=False),
        "matter_rows": TensorDecl(rows, trained=False),
        "matter_pieces": TensorDecl(whole, trained=False),
    }


def _masked(slot: Tokens, values: Values, lowering: Lowering, pieces: int) -> Values:
    P = values["P"]
    mask = values["rows"] * values["pieces"].repeat_interleave(P.shape[1] // pieces, dim=1)
    return {"p": P * mask}


def _weigh(values: Values, gradients: Values, keep: float, keep_pieces: float) -> None:
    """Add |dL/dmask| of a global batch, which for a mask of 1 is the sum of P * dL/dP under it."""
    for site in _sites(values):
        pieces = values[f"{site}.pieces"]
        slopes = (values[f"{site}.P"] * gradients[f"{site}.P"]).view(*pieces.shape, -1).sum(-1)
        values[f"{site}.matter_rows"].add_(slopes.sum(-1, keepdim=True).abs())
        values[f"{site}.matter_pieces"].add_(slopes.abs())


def _prune(values: Values, gradients: Values, step: int, total: int, keep: float, keep_pieces: float) -> None:
    for site in _sites(values):
        rows, pieces = values[f"{site}.rows"], values[f"{site}.pieces"]
        if step + 1 == max(1, total // 3):
            _keep_largest(rows, values[f"{site}.matter_rows"], round(keep * len(rows)))
        if step + 1 == max(1, 2 * total // 3):
            matter = values[f"{site}.matter_pieces"].where(rows > 0, -1)
            _keep_largest(pieces, matter, round(keep_pieces * pieces.shape[1] * int(rows.sum().cpu())))


def _keep_largest(mask: Tensor, matter: Tensor, count: int) -> None:
    chosen = matter.flatten().topk(max(1, count)).indices
    mask.zero_().view(-1)[chosen] = 1


def _sites(values: Values) -> Iterator[str]:
    """Names of a slot at a site, up to the part."""
    return (name.removesuffix(".matter_rows") for name in values if name.endswith(".matter_rows"))


METHODS = (
    Method("dpt", "arXiv 2310.10094", 3e-2, dpt),
    Method("residual-prompt", "arXiv 2305.03937", 3e-2, residual_prompt),
    Method("mpt", "arXiv 2303.02861", 3e-2, mpt),
    Method("pruned-prompt", "arXiv 2210.04457", 3e-2, pruned_prompt, hooks=_pruning),
)
PARAMETRIZATIONS = (
    Parametrization("residual-prompt", _residual, _residual_own),
    Parametrization("rank-one-prompt", _rank_one, _rank_one_own),
    Parametrization("pruned-prompt", _masked, _masked_own, formerly="xprompt"),
)
HOOKS = (Hook("pruned-prompt", gradient=_weigh, after_step=_prune, formerly="xprompt"),)
PEFT = (
    Peft(
        kind="MULTITASK_PROMPT_TUNING",
        method="mpt",
        names={"length": ("num_virtual_tokens", 100)},
        needs={"num_tasks": 1, "num_ranks": 1},
        idle={"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "prompt_tuning_init_task": None},
        sides={},
        layered=False,
        own={
            "P": Kept("prompt_embeddings", of="file"),
            "u": Kept("prefix_task_cols", shape=lambda slot: (1, slot.length, 1), of="file"),
            "v": Kept("prefix_task_rows", shape=(1, 1, -1), of="file"),
        },
    ),
)

"""Mixtures of LoRA experts, y += s sum_i w_i B_i A_i x, with weights of the row or of the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Experts, Projections, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def molora(
    r: Rank = 4, experts: Experts = 4, alpha: Alpha = 8.0, at: Projections = "linear", top: int = 0
) -> tuple[Slot, ...]:
    """A mixture of LoRAs at every projection, y += s sum_i w_i B_i A_i x with w = softmax(W_g x) of every row (Zadouri
    et al. 2023, arXiv 2309.05444); with `top` over the highest scores alone (MoLA, Gao et al. 2024, arXiv 2402.08562).

    Deviations: MoLA gives layers different numbers of experts: write a term a group of layers, `molora(experts=2)@0-15
    + molora(experts=6)@16-31`. There is no loss that balances the experts. All experts are computed, chosen or not.

    Choose when: one job holds several kinds of text. It costs as much as a LoRA of all experts' ranks and does not
    merge.
    """
    return (_mixture(r, experts, alpha, at, top),)


def hydralora(r: Rank = 8, experts: Experts = 3, alpha: Alpha = 16.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """One A for all experts and a B each, weighed by the row: y += s sum_i w_i B_i A x, w = softmax(W_g x) (Tian et al.
    2024, arXiv 2404.19245, eq. 3 and 4).

    Deviations: The number of experts is yours to give; the paper finds it by clustering the data. The router reads x
    itself, by W_g [experts, in]; the paper writes it with r rows.

    Choose when: `molora` is too large: the A is shared, so that an expert costs half.
    """
    return (_mixture(r, experts, alpha, at, form=DeclRef("one_down")),)


def job_gated_experts(
    r: Rank = 16, experts: Experts = 8, alpha: Alpha = 16.0, at: Projections = "linear", task: int = 16
) -> tuple[Slot, ...]:
    """Several LoRAs whose weights are the job's own, the same at all rows and sites: w = softmax(W_T e) with a trained
    vector e and one W_T (after MOELoRA: Liu et al. 2023, arXiv 2310.18339, section 3.3).

    `r` is the ranks of all experts together, `task` the length of e.

    Deviations: MOELoRA trains the experts over several tasks, each with its own e, so that tasks share experts; a job
    here has one task and one e, and hence the name. What is served is a plain LoRA.

    Choose when: you mean to compare with MOELoRA's form; for one task LoRA has the same functions with fewer numbers.
    """
    if experts < 1 or r % experts:
        raise SpecError(f"peft: experts: {experts} do not share rank {r} evenly")
    form = DeclRef("task_gate", (("experts", experts), ("task", task)))
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), form=form),)


def _mixture(r: int, experts: int, alpha: float, at: str, top: int = 0, form: DeclRef | None = None) -> Branch:
    if experts < 1:
        raise SpecError(f"peft: experts: {experts} is not a count; give at least 1")
    rank, scale = r * experts, alpha / max(r, 1)
    return Branch(at=at, rank=rank, scale=scale, gate="softmax", experts=experts, top=top, form=form)


def _one_down_own(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank // slot.experts, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out)),
        "G": TensorDecl((slot.experts, place.d_in), "kaiming"),
    }


def _one_down(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"A": values["A"].repeat(slot.experts, 1), "B": values["B"], "G": values["G"]}


def _task_own(slot: Branch, place: SiteShape, experts: int, task: int) -> Mapping[str, TensorDecl]:
    return {"A": TensorDecl((slot.rank, place.d_in), "kaiming"), "B": TensorDecl((slot.rank, place.d_out))}


def _task_shared(slot: Branch, places: Sequence[SiteShape], experts: int, task: int) -> Mapping[str, TensorDecl]:
    return {"e": TensorDecl((task,), DeclRef("normal", (("std", 1.0),))), "T": TensorDecl((experts, task), "kaiming")}


def _task_gate(
    slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, experts: int, task: int
) -> Mapping[str, Tensor]:
    weights = (values["T"] @ values["e"]).softmax(0).repeat_interleave(slot.rank // experts)
    return {"A": values["A"], "B": weights[:, None] * values["B"]}


METHODS = (
    Method("molora", "arXiv 2309.05444", 3e-4, molora),
    Method("hydralora", "arXiv 2404.19245", 3e-4, hydralora),
    Method("job-gated-experts", "arXiv 2310.18339", 3e-4, job_gated_experts),
)
PARAMETRIZATIONS = (
    Parametrization("one_down", _one_down, _one_down_own),
    Parametrization("task_gate", _task_gate, _task_own, _task_shared),
)

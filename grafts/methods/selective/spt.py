"""Sensitivity-aware tuning: a LoRA where many entries of W matter, else just those entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Density, Projections, Rank
from polygraft.grafts.sizes import sparse_parts
from polygraft.grafts.spec import Branch, DeclRef, Slot, Sparse, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sites import Site
    from polygraft.grafts.sizes import TensorSpec


def spt(r: Rank = 8, alpha: Alpha = 16.0, density: Density = 0.01, at: Projections = "linear") -> tuple[Slot, ...]:
    """Sensitivity-aware tuning: the entries of W whose first gradient step lowers the loss most are found in all
    matrices together; a matrix with as many of them as a LoRA has parameters gets a LoRA, the others train just those
    entries (He et al. 2023, arXiv 2303.08566, section 3). The survey's other SPT, selective prompt tuning, is not here.

    `density` is the share of all entries that are sensitive (the paper's tau).

    Deviations: Sensitivity is the squared gradient summed over the job's first samples. Both slots exist at every site,
    the one that is not chosen multiplied by 0, so `parameters` counts more than what learns; the paper's form with
    adapters is left out.

    Choose when: a budget is to go where the task needs it. It takes the memory of both slots.
    """
    if not 0 < density < 1:
        raise SpecError(f"peft: spt.density: {density} is outside (0, 1)")
    arguments = (("density", density),)
    return (
        Branch(at=at, rank=r, scale=alpha / max(r, 1), form=DeclRef("spt-lora", arguments)),
        Sparse(at=at, rank=r, pick=DeclRef("fisher_entries"), form=DeclRef("spt-sparse", arguments)),
    )


def _lora_own(slot: Branch, place: SiteShape, density: float) -> Mapping[str, TensorDecl]:
    start = DeclRef("spt_chosen", (("density", density), ("entries", slot.rank * (place.d_in + place.d_out))))
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out)),
        "chosen": TensorDecl((1,), start, trained=False),
    }


def _lora(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, density: float) -> Mapping[str, Tensor]:
    return {"A": values["A"], "B": values["chosen"] * values["B"]}


def _sparse_own(slot: Sparse, place: SiteShape, density: float) -> Mapping[str, TensorDecl]:
    parts = dict(sparse_parts(slot, place))
    return parts | {
        "sensitive": TensorDecl(parts["w"].shape, DeclRef("spt_sensitive", (("density", density),)), trained=False)
    }


def _sparse(slot: Sparse, values: Mapping[str, Tensor], lowering: Lowering, density: float) -> Mapping[str, Tensor]:
    return {"w": values["sensitive"] * values["w"], "i": values["i"]}


def _chosen(tensor: TensorSpec, making: Making, density: float, entries: int) -> Tensor:
    """1 where the matrix has at least `entries` sensitive entries."""
    import torch

    assert tensor.site is not None
    return torch.tensor([float(_count(making, tensor.site, density) >= entries)])


def _sensitive(tensor: TensorSpec, making: Making, density: float) -> Tensor:
    """1 at the sensitive ones among the chosen entries, all 0 where they are as many as all that have room."""
    from polygraft.grafts.methods.selective.entries import best

    assert tensor.site is not None
    fisher, entries = making.fisher[tensor.site], tensor.shape[0]
    if _count(making, tensor.site, density) >= entries:
        return fisher.new_zeros(tensor.shape)
    rows, columns = best(fisher, entries).unbind(1)
    return (fisher[rows, columns] >= _threshold(making, density)).to(fisher.dtype).unsqueeze(1)


def _count(making: Making, site: Site, density: float) -> int:
    return int((making.fisher[site] >= _threshold(making, density)).sum())


def _threshold(making: Making, density: float) -> float:
    """The sensitivity of the last entry inside the share `density` of all."""

    def make() -> float:
        import torch

        everything = torch.cat([fisher.flatten() for fisher in making.fisher.values()])
        return float(everything.topk(max(1, int(density * len(everything)))).values[-1])

    return making.once(("spt", density), make)


METHODS = (Method("spt", "arXiv 2303.08566", 3e-4, spt),)
PARAMETRIZATIONS = (Parametrization("spt-lora", _lora, _lora_own), Parametrization("spt-sparse", _sparse, _sparse_own))
STARTS = (Start("spt_chosen", _chosen), Start("spt_sensitive", _sensitive))

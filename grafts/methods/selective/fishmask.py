"""Entries and rows of W that matter most to the loss on the job's first samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Density, Projections
from polygraft.grafts.sizes import sparse_parts
from polygraft.grafts.spec import DeclRef, Slot, Sparse, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sites import Site
    from polygraft.grafts.sizes import TensorSpec

_ON, _SEEN = "dip_on", "dip_seen"  # parts that no other method has, since the hook knows its tensors by them


def fishmask(density: Density = 0.005, room: float = 4.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """The entries of W with the largest empirical Fisher information on the job's first samples, in all matrices
    together, and only they are trained (Sung et al. 2021, arXiv 2111.09839).

    Chosen once, it is Child-Tuning_D, too (Xu et al. 2021, arXiv 2109.05687, section 2).

    `density` is the share of all entries; a matrix has room for at most `room` times its own share of them.

    Deviations: What would go beyond a matrix's room goes to the next best elsewhere; a larger `room` makes that rarer
    and costs memory, as room is what is allocated and counted. The entries are those of `at`, where the paper has the
    whole model's.

    Choose when: the change must be sparse, to be merged or added with others. Finding the mask takes a gradient of W on
    a few samples.
    """
    if not 0 < density <= 1 or room < 1:
        raise SpecError(f"peft: fishmask: density {density} is outside (0, 1], or room {room} below 1")
    form = DeclRef("fishmask", (("density", density),))
    return (Sparse(at=at, density=min(1.0, density * room), pick=DeclRef("fisher_entries"), form=form),)


def moving_mask(
    density: Density = 0.005, pool: float = 4.0, every: int = 10, at: Projections = "linear"
) -> tuple[Slot, ...]:
    """A share of W's entries learns at a time, chosen anew every few steps by the squared gradients since the last
    choice, inside a fixed pool of candidates with the largest Fisher information (after Fish-Dip: Das et al. 2023,
    arXiv 2311.03748, section 3).

    A share `density` learns at a time, among `pool` times as many; `every` so many steps they are chosen anew.

    Deviations: Fish-Dip's point is to compute the mask on the training samples of the largest loss; here it is computed
    on all batches, inside a pool, and in each matrix by itself, hence the name.

    Choose when: `fishmask`'s first choice may be wrong, as where the loss changes its nature in training.
    """
    if pool < 1 or every < 1:
        raise SpecError(f"peft: moving-mask: pool {pool} and every {every}; both are at least 1")
    form = DeclRef("moving-mask", (("pool", pool),))
    return (Sparse(at=at, density=min(1.0, density * pool), pick=DeclRef("fisher_entries"), form=form),)


def _hooks(every: int = 10, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("moving-mask", (("every", every),)),)


def moved_rows(density: Density = 0.1, at: str = "ffn.gate|ffn.up") -> tuple[Slot, ...]:
    """Whole rows of the feed-forward's first projections learn, those that one gradient step on the job's first samples
    would move most in the L1 norm (after FAR: Vucetic et al. 2022, arXiv 2205.01541, section 3).

    `density` is the share of each matrix's rows.

    Deviations: FAR fine-tunes everything for a share of the steps before it chooses, and regroups the chosen nodes so
    that memory is saved; here one step decides and nothing is regrouped, hence the name.

    Choose when: sparse changes by whole neurons are wanted: they are products of matrices, and no gathers.
    """
    return (Sparse(at=at, density=density, rows=True, pick=DeclRef("moved_rows")),)


def _fishmask_own(slot: Sparse, place: SiteShape, density: float) -> Mapping[str, TensorDecl]:
    parts = dict(sparse_parts(slot, place))
    start = DeclRef("fisher_chosen", (("density", density),))
    return parts | {"chosen": TensorDecl(parts["w"].shape, start, trained=False)}


def _fishmask(slot: Sparse, values: Mapping[str, Tensor], lowering: Lowering, density: float) -> Mapping[str, Tensor]:
    return {"w": values["chosen"] * values["w"], "i": values["i"]}


def _chosen(tensor: TensorSpec, making: Making, density: float) -> Tensor:
    """1 at the candidates that are among the share `density` of the entries of all the slot's matrices together."""
    import torch

    from polygraft.grafts.methods.selective.entries import best

    def make() -> Mapping[Site, Tensor]:
        own = [one for one in making.graft.tensors if one.slot == tensor.slot and one.part == "chosen"]
        counts = {one.site: one.shape[0] for one in own if one.site is not None}
        fisher = {site: making.fisher[site] for site in counts}
        scores = torch.cat([fisher[site][best(fisher[site], count).unbind(1)] for site, count in counts.items()])
        wanted = max(1, int(density * sum(one.numel() for one in fisher.values())))
        mask = _top(scores.unsqueeze(1), min(wanted, len(scores)))
        return dict(zip(counts, mask.split_with_sizes([*counts.values()]), strict=True))

    assert tensor.site is not None
    return making.once(("fishmask", tensor.slot), make)[tensor.site]


def _own(slot: Sparse, place: SiteShape, pool: float) -> Mapping[str, TensorDecl]:
    parts = dict(sparse_parts(slot, place))
    state = TensorDecl(parts["w"].shape, trained=False)
    return parts | {_ON: TensorDecl(state.shape, DeclRef("dip_first", (("pool", pool),)), trained=False), _SEEN: state}


def _operands(slot: Sparse, values: Mapping[str, Tensor], lowering: Lowering, pool: float) -> Mapping[str, Tensor]:
    return {"w": values["w"], "i": values["i"]}


def _first(tensor: TensorSpec, making: Making, pool: float) -> Tensor:
    """1 at the candidates of the largest Fisher information, which lie in the order of `entries.places`."""
    from polygraft.grafts.methods.selective.entries import best

    assert tensor.site is not None
    fisher = making.fisher[tensor.site]
    rows, columns = best(fisher, tensor.shape[0]).unbind(1)
    return _top(fisher[rows, columns].unsqueeze(1), max(1, int(tensor.shape[0] / pool)))


def _top(scores: Tensor, count: int) -> Tensor:
    """1 at the `count` highest of a column, 0 elsewhere."""
    import torch

    return torch.zeros_like(scores).index_fill_(0, scores[:, 0].topk(count).indices, 1.0)


def _gradient(values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], every: int) -> None:
    """Note every candidate's squared gradient, and let those inside the mask learn."""
    for name, gradient in gradients.items():
        stem = name.rpartition(".")[0]
        if f"{stem}.{_ON}" in values:
            values[f"{stem}.{_SEEN}"].add_(gradient.nan_to_num(0.0, 0.0, 0.0).square())
            gradient.masked_fill_(values[f"{stem}.{_ON}"] == 0, 0.0)


def _after_step(
    values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, total: int, every: int
) -> None:
    for name, mask in values.items():
        if name.endswith(f".{_ON}") and (step + 1) % every == 0:
            seen = values[name.removesuffix(_ON) + _SEEN]
            mask.copy_(_top(seen, int(mask.sum().cpu())))
            seen.zero_()


METHODS = (
    Method("fishmask", "arXiv 2111.09839", 3e-4, fishmask, aliases=("child-tuning-d",)),
    Method("moving-mask", "arXiv 2311.03748", 3e-4, moving_mask, hooks=_hooks),
    Method("moved-rows", "arXiv 2205.01541", 3e-4, moved_rows),
)
PARAMETRIZATIONS = (
    Parametrization("fishmask", _fishmask, _fishmask_own),
    Parametrization("moving-mask", _operands, _own, formerly="fish-dip"),
)
STARTS = (Start("fisher_chosen", _chosen), Start("dip_first", _first))
HOOKS = (Hook("moving-mask", gradient=_gradient, after_step=_after_step, formerly="fish-dip"),)

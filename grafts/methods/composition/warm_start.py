"""Grafts that go on from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import DeclRef, GraftSpec, Slot, SpecError, Tokens, source_names

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def go_on(*, of: str = "one") -> tuple[Slot, ...]:
    """A way to start, written beside what is trained: `lora(r=8) + from(of=support)` starts all tensors as those of a
    trained graft with the same slots, or as the mean of several. Its case for prompts is SPoT (Vu et al. 2022, arXiv
    2110.07904, sections 2 and 3.3).

    `of` names them, joined by `|`. From a supernet (`elastic`) starts any of its subnets.

    Deviations: For methods other than prompts it is no paper's; the names are given, and not found by similarity.

    Choose when: more data of a task have come, or a related task is at hand. The optimiser starts anew.
    """
    return ()


def go_on_hooks(*, of: str = "one") -> tuple[DeclRef, ...]:
    """What makes all tensors of a graft start as those of the grafts `of`."""
    if not source_names(of):
        raise SpecError("of: it is empty; name the graft to start from")
    return (DeclRef("from", (("of", of),)),)


def spot(length: Rows = 20, *, of: str = "one") -> tuple[Slot, ...]:
    """SPoT: a prompt that starts as one trained on another task, or as the mean of several (Vu et al. 2022, arXiv
    2110.07904, sections 2 and 3.3).

    `of` names the prompts, of `length` rows each.

    Deviations: The paper finds source tasks by the similarity of their prompts, by which it weighs them, too; here you
    name them, and each counts as much.

    Choose when: a job has few examples and a prompt of a related task exists.
    """
    return (Tokens(length=length),)


def _spot(length: int = 20, *, of: str = "one") -> tuple[DeclRef, ...]:
    return go_on_hooks(of=of)


def ipt(length: Rows = 20, d: int = 1, *, of: str = "one|two") -> tuple[Slot, ...]:
    """Intrinsic prompt tuning: a prompt that moves only inside the subspace which prompts of other tasks span, P = m +
    sum_i z_i D_i, z alone being trained (Qin et al. 2021, arXiv 2110.07867, section 3).

    `of` names the prompts, `d` is how many numbers are trained, fewer than prompts.

    Deviations: The paper finds the subspace by an auto-encoder over many tasks' prompts; here D are the principal
    components of the prompts that are named.

    Choose when: there are many prompts and almost no examples: z has a few numbers.
    """
    if not 1 <= d < len(source_names(of)):
        raise SpecError(
            f"peft: d: {d} dimensions of {len(source_names(of))} prompts; give at least 1, and fewer than them"
        )
    return (Tokens(length=length, form=DeclRef("ipt", (("d", d), ("of", of)))),)


def _ipt_own(slot: Tokens, place: SiteShape, d: int, of: str) -> Mapping[str, TensorDecl]:
    rows = DeclRef("subspace", (("of", of),))
    return {
        "z": TensorDecl((d,)),
        "D": TensorDecl((d, slot.length, place.d_out), rows, trained=False),
        "m": TensorDecl((slot.length, place.d_out), rows, trained=False),
    }


def _ipt(slot: Tokens, values: Mapping[str, Tensor], lowering: Lowering, d: int, of: str) -> Mapping[str, Tensor]:
    return {"p": values["m"] + (values["z"][:, None, None] * values["D"]).sum(0)}


def _subspace(tensor: TensorSpec, making: Making, of: str) -> Tensor:
    """The mean of the sources' prompts, or the directions in which they differ most, as long as they spread in each."""
    import torch

    prompts = [making.source(name) for name in source_names(of)]
    rows = torch.stack([source.tensors[f"{_prompt(source.graft.spec)}.0.embed.p"].double() for source in prompts])
    mean = rows.mean(0)
    if tensor.part == "m":
        return mean
    _, lengths, directions = torch.linalg.svd((rows - mean).flatten(1), full_matrices=False)
    spread: Tensor = lengths[:, None] * directions / len(prompts) ** 0.5
    return spread[: tensor.shape[0]].view(tensor.shape)


def _check(tensor: TensorSpec, graft: BoundGraft, sources: Mapping[str, BoundGraft], of: str) -> None:
    for name in source_names(of):
        spec = sources[name].spec
        slot = spec.slots[_prompt(spec, name)]
        if (slot.length, len(spec.slots)) != (tensor.shape[-2], 1):  # type: ignore[union-attr]
            raise SpecError(f"of: {name!r} is {spec.method!r}, not a prompt of {tensor.shape[-2]} rows alone")


def _prompt(spec: GraftSpec, name: str = "it") -> int:
    """Which slot is the prompt."""
    for index, slot in enumerate(spec.slots):
        if isinstance(slot, Tokens) and (slot.mode, slot.gate) == ("before", "none"):
            return index
    raise SpecError(f"of: {name!r} is {spec.method!r}, without a prompt")


METHODS = (
    Method("from", "arXiv 2110.07904", 1.0, go_on, hooks=go_on_hooks),
    Method("spot", "arXiv 2110.07904", 3e-2, spot, hooks=_spot),
    Method("ipt", "arXiv 2110.07867", 3e-1, ipt),
)
PARAMETRIZATIONS = (Parametrization("ipt", _ipt, _ipt_own),)
STARTS = (Start("subspace", _subspace, _check),)
HOOKS = (Hook("from"),)

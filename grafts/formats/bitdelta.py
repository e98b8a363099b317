"""A fine-tuned model as one bit an element on top of the model it was tuned from (BitDelta, Liu et al. 2024, arXiv
2402.10193)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.methods.compressed.bitdelta import packed
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape, Site
from polygraft.grafts.spec import GraftSpec, SpecError


def bitdelta_of(
    shape: ModelShape, base: Callable[[Site], Tensor], tuned: Callable[[Site], Tensor], at: str = "linear"
) -> tuple[BoundGraft, dict[str, Tensor]]:
    """The graft W + a S of all projections `at`, with S the signs of tuned - base and a their mean size, which is
    nearest to the difference (section 3.1). `base` and `tuned` give W [out, in].

    What else was tuned (embeddings, norms) is not in the graft. Raises SpecError for a tuned W of another shape.
    """
    slots, _ = find("bitdelta").build({"at": at})
    graft = BoundGraft(GraftSpec(f"bitdelta(at={at})", slots), shape)
    values: dict[str, Tensor] = {}
    for index, site in graft.sites:
        before, after = base(site).float(), tuned(site).float()
        if before.shape != after.shape:
            raise SpecError(f"{site}: tuned W is {list(after.shape)}, the backbone's {list(before.shape)}")
        change = after - before
        values[f"{index}.{site}.a"] = change.abs().mean().view(1)
        values[f"{index}.{site}.signs"] = packed(change)
    return graft, values


def left_out(graft: BoundGraft, base: BackboneFiles, tuned: BackboneFiles) -> tuple[str, ...]:
    """The tensors of the files that differ in the tuned model, or that one of the two alone has, outside the graft."""
    inside = {f"{base.module(site)}.weight" for _, site in graft.sites}
    names = sorted((base.files.keys() | tuned.files.keys()) - inside)
    return tuple(name for name in names if not _same(name, base, tuned))


def _same(name: str, base: BackboneFiles, tuned: BackboneFiles) -> bool:
    if name not in base.files or name not in tuned.files:
        return False
    before, after = base.wide(name), tuned.wide(name)
    return before.shape == after.shape and torch.equal(before, after)

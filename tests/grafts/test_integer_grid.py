"""PEQA and QA-LoRA, merged, are integers with scales and offsets again, and not one bit is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.merge import Fold
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from tests.grafts.oracle.row import Values, random_tensors, relative

SITES = (Site(0, "attn.v"), Site(1, "ffn.down"))


@pytest.fixture(scope="module")
def fp64(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64)


def folded(text: str, backbone: Backbone) -> tuple[Fold, Values]:
    """A trained graft, merged."""
    graft = BoundGraft(parse(text), backbone.shape)
    values = random_tensors(graft, seed=4)
    return Fold(graft, values, backbone.weight), values


def groups_of(W: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The groups [out, size] of a matrix's inputs, with their numbers."""
    return enumerate(W.split(size, dim=1))


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 16), (2, 32)])
def test_peqa_merges_into_its_frozen_integers_and_trained_scales(bits: int, group: int, fp64: Backbone) -> None:
    """W' = s (clamp(round(W0 / s0) + z0, 0, 2^b - 1) - z0) (Kim et al. 2023, eq. 2), in float64 to the last bit."""
    fold, values = folded(f"peqa(bits={bits}, group={group})", fp64)
    for site in SITES:
        W, merged = fp64.weight(site), fold.at(site).weight
        for number, W0 in groups_of(W, group or W.shape[1]):
            low, high = W0.amin(1, keepdim=True).clamp(max=0), W0.amax(1, keepdim=True).clamp(min=0)
            s0 = (high - low) / (2**bits - 1)
            z0 = -torch.round(low / s0)
            q = torch.clamp(torch.round(W0 / s0) + z0, 0, 2**bits - 1)
            s = values[f"0.{site}.s"][:, number : number + 1]
            assert torch.equal(merged.split(W0.shape[1], dim=1)[number], s * (q - z0))
            assert torch.equal(z0, z0.round()) and len(q.unique()) == 2**bits


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 8), (2, 16)])
def test_qalora_merges_into_the_offsets_of_its_integers(bits: int, group: int, fp64: Backbone) -> None:
    """merge_with_quantization of Xu et al. 2023, algorithm 1: beta' = beta + s A B, scales and integers unchanged."""
    fold, values = folded(f"qalora(r=4, alpha=6, bits={bits}, group={group})", fp64)
    for site in SITES:
        W, grid = fp64.weight(site), fold.grid(site)
        assert grid is not None
        A, B = values[f"0.{site}.A"], values[f"0.{site}.B"]
        for number, W0 in groups_of(W, group):
            beta = W0.amin(1)
            alpha = (W0.amax(1) - beta) / (2**bits - 1)
            assert torch.equal(grid.scale[:, number], alpha)
            assert torch.equal(grid.q[:, number], torch.round((W0 - beta[:, None]) / alpha[:, None]))
            assert relative(grid.offset[:, number], beta + 1.5 * B.T @ A[:, number]) < 1e-15
        merged = torch.stack(
            [grid.scale[:, i, None] * grid.q[:, i] + grid.offset[:, i, None] for i in range(A.shape[1])]
        )
        assert torch.equal(fold.at(site).weight, merged.transpose(0, 1).flatten(1))
        assert set(grid.q.unique().tolist()) == set(range(2**bits))


def test_what_acts_beside_takes_the_weight_off_the_grid(fp64: Backbone) -> None:
    fold, _ = folded("peqa(at=attn.v) + lora(r=2, at=attn.v)@0", fp64)
    assert fold.grid(SITES[0]) is None and fold.grid(Site(1, "attn.v")) is not None

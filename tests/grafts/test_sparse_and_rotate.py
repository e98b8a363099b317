"""What sparse and rotate slots refuse, and where the entries lie that they start with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.check import FormatError, check
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.merge import Fold
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import Affine, SpecError
from tests.grafts.oracle.row import random_tensors

SAMPLES = ((5, 6, 7, 8), (9, 10, 11))


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shira(r=0)", "rank: 0"),
        ("shira(r=40)", "rank: 40 means 5120 of the 4096 entries"),
        ("pafi(density=1.5)", "density: 1.5"),
        ("pafi(density=0.0001)", "density: 0.0001 means 0 of"),
        ("supertuning(end=middle)", "'middle' is neither top nor bottom"),
        ("oft(b=7)", "7 channels turn together, which does not divide the 64"),
        ("oft(b=8, neumann=2)", "neumann: 2"),
        ("boft(b=4, m=9)", "1024 channels"),
        ("boft(b=1, m=2)", "size: 1 is odd"),
        ("boft(m=20)", "stages: 20"),
        ("hra(r=3)", "r: 3 reflections"),
        ("road(variant=3)", "variant: 3 is not one of 1, 2, 4"),
        ("road(group=64)", "64 channels turn together, which does not divide the 32"),
        ("oft(b=8) + hra(r=2, at=attn.q)", "two rotations"),
        ("dora(r=2) + shira(r=1, at=attn.v)", "DoRA's norm .* found sparse"),
        ("shira(at=ffn.out)", "'ffn.out'"),
        ("moved-rows(density=0.001)", "density: 0.001 means 0 of the 96 rows"),
        ("moving-mask(pool=0.5)", "pool 0.5"),
        ("spt(density=0)", "spt.density: 0.0"),
        ("lt-sft(prime=1)", "prime: 1.0"),
        ("diff-pruning(relax=0)", "relax: 0.0"),
        ("child-tuning(p=1.5)", "p: 1.5"),
        ("s-bitfit(density=1)", "s-bitfit.density: 1.0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(text: str, words: str, fp32: Backbone) -> None:
    with pytest.raises(SpecError, match=words):
        _ = BoundGraft(parse(text), fp32.shape).operands


def test_a_scale_of_rows_has_no_shift() -> None:
    with pytest.raises(SpecError, match="give side out"):
        Affine(at="linear", scale=True, shift=True, side="rows")


@pytest.mark.parametrize("index", [-1.0, 64.0, 0.5])
def test_a_file_with_an_index_outside_the_matrix_is_refused(index: float, fp32: Backbone) -> None:
    graft = BoundGraft(parse("shira(r=1, at=attn.q)@0"), fp32.shape)
    values = random_tensors(graft, seed=0)
    values["0.0.attn.q.i"] = torch.zeros_like(values["0.0.attn.q.i"])
    check(graft, values)
    values["0.0.attn.q.i"][3, 1] = index
    with pytest.raises(FormatError, match=r"0.0.attn.q.i: .* no index below 64"):
        check(graft, values)


@pytest.mark.parametrize(
    ("text", "largest"), [("pafi(density=0.1)", False), ("supertuning(sparsity=0.9)", True)], ids=["pafi", "super"]
)
def test_magnitude_picks_the_ends_of_the_weights(text: str, largest: bool, fp32: Backbone) -> None:
    values = initialise(BoundGraft(parse(text), fp32.shape), fp32, seed=0, samples=SAMPLES)
    for site in (Site(0, "attn.k"), Site(1, "ffn.down")):
        size, place = fp32.weight(site).abs(), values[f"0.{site}.i"].long()
        chosen = torch.zeros_like(size, dtype=torch.bool).index_put(tuple(place.T), torch.tensor(True))
        assert int(chosen.sum()) == len(place) == int(size.numel() * (0.1 if text.startswith("pafi") else 1 - 0.9))
        inside, outside = size[chosen], size[~chosen]
        assert inside.min() >= outside.max() if largest else inside.max() <= outside.min()


def test_random_entries_are_distinct_and_of_the_seed(fp32: Backbone) -> None:
    graft = BoundGraft(parse("shira(r=2)"), fp32.shape)
    first, again, other = (initialise(graft, fp32, seed=s, samples=SAMPLES) for s in (1, 1, 2))
    for name, value in first.items():
        if name.endswith(".i"):
            assert len(value.unique(dim=0)) == len(value)
            assert torch.equal(value, again[name]) and not torch.equal(value, other[name])


@pytest.mark.parametrize("text", ["oft(b=8)", "boft(m=2)", "hra(r=4)", "road(group=16)", "road(variant=4, group=8)"])
def test_a_rotation_starts_as_the_identity(text: str, fp32: Backbone) -> None:
    graft = BoundGraft(parse(text), fp32.shape)
    fold = Fold(graft, initialise(graft, fp32, seed=0, samples=SAMPLES), fp32.weight)
    for site in fold.sites:
        assert torch.allclose(fold.at(site).weight, fp32.weight(site), atol=1e-5)

"""How large a graft is: derived from its slots, and the same as what is allocated, trained and what PEFT allocates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.sites import ModelShape
from tests.grafts.oracle.table import METHODS, MORE

ROWS = {**METHODS, **MORE}


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder)


@pytest.mark.parametrize("name", ROWS)
def test_the_count_is_that_of_the_tensors_there_are(name: str, backbone: Backbone) -> None:
    graft = ROWS[name].graft(backbone.shape)
    values = initialise(graft, backbone, seed=0, samples=((1, 2, 3),))
    count = graft.parameters
    assert count == sum(value.numel() for value in values.values()) == Slab(graft).master.numel()
    assert [(t.name, t.shape) for t in graft.tensors] == [(n, v.shape) for n, v in values.items()]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("lora(r=8, at=attn.[qv])", 2 * 8 * (64 + 64 + 64 + 32)),  # two layers; q is 64 to 64, v 64 to 32
        ("dora(r=4, at=ffn.down)@1", 4 * (96 + 64) + 64),
        ("ia3", 2 * (32 + 32 + 96)),
        ("bitfit", 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)),
        ("prefix(10)", 2 * 10 * (32 + 32)),
        ("serial(16)", 2 * 2 * 16 * (64 + 64)),
        ("parallel(16)", 2 * 16 * (64 + 64)),
    ],
)
def test_the_count_is_what_the_paper_says(text: str, count: int, tiny_folder: Path) -> None:
    shape = ModelShape.from_config(json.loads((tiny_folder / "config.json").read_text()))
    assert BoundGraft(parse(text), shape).parameters == count


def test_a_tensors_start_depends_on_the_seed_and_its_name_alone(backbone: Backbone) -> None:
    small, large = (BoundGraft(parse(text), backbone.shape) for text in ("lora(r=4)", "lora(r=4) + prefix(3) + bitfit"))
    one = initialise(small, backbone, seed=5, samples=((1,),))
    two = initialise(large, backbone, seed=5, samples=((1,),))
    other = initialise(small, backbone, seed=6, samples=((1,),))
    assert all(two[name].equal(value) for name, value in one.items())
    assert not other["0.0.attn.q.A"].equal(one["0.0.attn.q.A"])
    assert not one["0.0.attn.q.A"].equal(one["0.1.attn.q.A"])

"""Late prompts: deeper than the tiny model of the table, what they start as, what they are served as, what is said of
them and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.catalogue import entry
from polygraft.grafts.formats.plain import plain
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.lowering import Lowered, lower
from polygraft.grafts.methods.registry import find
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.family_late import late
from tests.grafts.oracle.row import Row, random_tensors, relative
from tests.grafts.oracle.table import METHODS
from tests.grafts.test_methods import batch, decoded, judged, ours
from tests.tiny import tiny_llama

DEEP = Row("lpt(6)@2-4", model=late(2))
SAMPLES = ((5, 6, 7, 8, 9, 10, 11), (12, 13))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("deep"), layers=5)


@pytest.fixture(scope="module")
def fp64(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float64)


def test_its_rows_run_through_every_layer_above(fp64: Backbone, folder: Path) -> None:
    values, (prompts, slopes) = DEEP.values(fp64.shape, seed=3), batch(fp64)
    expected, wanted = judged(DEEP.oracle(folder, values, torch.float64), prompts, slopes)
    company = [(DEEP, values), (METHODS["lora"], METHODS["lora"].values(fp64.shape, seed=4)), (DEEP, values)]
    found, gradients = ours(company, fp64, prompts, slopes)
    assert relative(found, expected) < 1e-9
    assert relative(gradients["0.shared.P"], wanted["0.shared.P"]) < 1e-9


def test_decoding_gives_the_oracles_logits_in_every_dtype(fp64: Backbone, folder: Path) -> None:
    """Lowered on the backbone that serves it; bf16 as near as the bare backbone in bf16 is."""
    ids = batch(fp64)[0][1]
    values = DEEP.values(fp64.shape, seed=5)
    wanted = DEEP.oracle(folder, values, torch.float64).logits(ids)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        backbone = Backbone.load(folder, dtype)
        own = {name: value.to(torch.promote_types(dtype, torch.float32)) for name, value in values.items()}
        served = lower(DEEP.graft(backbone.shape), own, backbone.weight, backbone.run_from_layer)
        lone = Resident("lone", METHODS["lora"].graft(backbone.shape), METHODS["lora"].values(backbone.shape, seed=6))
        found = decoded(backbone, [Resident("own", *served), lone], ids, chunks=(9, 6, 1, 1, 1, 1, 1))
        assert relative(found, wanted) < tolerance, dtype


def test_served_it_is_a_prefix_of_its_layers(fp64: Backbone) -> None:
    graft, values = lower(DEEP.graft(fp64.shape), DEEP.values(fp64.shape, seed=1), fp64.weight, fp64.run_from_layer)
    prefix = BoundGraft(parse("prefix(6)@2-4"), fp64.shape)
    assert graft.spec.slots == prefix.spec.slots
    assert [(t.name, t.shape) for t in prefix.tensors] == [(n, tuple(v.shape)) for n, v in values.items()]


def test_the_prompts_rows_run_once_for_all_layers(fp64: Backbone) -> None:
    calls: list[int] = []

    def counted(rows: torch.Tensor, first: int) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
        calls.append(first)
        return fp64.run_from_layer(rows, first)

    made = Lowered(DEEP.graft(fp64.shape), fp64.weight, counted)
    made.make(DEEP.values(fp64.shape, seed=1))
    assert calls == [2]


def test_it_starts_as_a_samples_rows_in_that_layer(fp64: Backbone) -> None:
    """So its keys and values are those of a prefix that starts as the same text."""
    started = initialise(DEEP.graft(fp64.shape), fp64, seed=0, samples=SAMPLES)
    assert started["0.shared.P"].shape == (6, fp64.shape.hidden)
    _, values = lower(DEEP.graft(fp64.shape), started, fp64.weight, fp64.run_from_layer)
    prefix = initialise(BoundGraft(parse("prefix(6)@2-4"), fp64.shape), fp64, seed=0, samples=SAMPLES)
    assert all(relative(values[name], value) < 1e-12 for name, value in prefix.items())


def test_what_is_said_of_it(fp64: Backbone) -> None:
    said = entry(find("late-prompt"))
    assert (said.name, said.kind, said.slots) == ("lpt", "prefix", ("kv form lpt",))
    assert said.prefix_cacheable and said.chunkable and not said.mergeable and not said.recompute_needs_prompt_len
    assert said.parameters == 20 * 4096
    assert DEEP.graft(fp64.shape).parameters == 6 * fp64.shape.hidden
    assert DEEP.spec.prefix_layers == (2, 3, 4) and DEEP.spec.context_length == 6


@pytest.mark.parametrize("arch", ["bert", "vit", "t5"])
def test_where_rows_see_others_it_is_refused(arch: str, tiny_folders: Mapping[str, Path]) -> None:
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    with pytest.raises(SpecError, match=r"lpt: .*would read the input"):
        BoundGraft(parse("lpt(3)@1"), backbone.shape)
    with pytest.raises(SpecError, match="by themselves"):
        backbone.run_from_layer(torch.zeros(3, backbone.shape.hidden), 1)


def test_without_a_backbone_its_operands_are_not_made(fp64: Backbone) -> None:
    values = random_tensors(DEEP.graft(fp64.shape), seed=1)
    with pytest.raises(SpecError, match="name a backbone"):
        lower(DEEP.graft(fp64.shape), values, fp64.weight)
    assert plain(BoundGraft(parse("lpt(3)"), fp64.shape), None) is None
    assert plain(BoundGraft(parse("prefix(3)"), fp64.shape), None) is not None
    with pytest.raises(SpecError, match="two prefixes"):
        parse("lpt(3)@1 + prefix(2)")

"""AdapterDrop and averaged adapters draw what the papers say, each step anew, and the same in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.lowering import lower
from polygraft.grafts.runtime import steps
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.linears.plain import PlainLinear
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.spec import SpecError
from polygraft.kernels.common.segments import Segments
from polygraft.launch.demo.oracle.naive import naive, serial
from tests.grafts.oracle.row import random_tensors
from tests.grafts.test_merge import unmerged
from tests.trainers.test_lora_family import loss_gradients, recorded
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, backbone_of, jobs_of, pack_of, run

METHODS = {"drop": "adapter-drop(4, upto=2)", "mix": "averaged-adapters(4, experts=3)", "plain": "serial(4)"}


@pytest.mark.parametrize("texts", [METHODS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(texts: dict[str, str], steps: int, folder: Path) -> None:
    backbone = backbone_of(folder, torch.float32)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_adapter_drop_trains_without_a_random_number_of_first_layers(
    fp64: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's gradient is that of the layers from n on, and over the steps all n come up."""
    job, seen = a_job("drop", "adapter-drop(4, upto=2)", seed=2, steps=14), set()
    for step, (before, gradients) in enumerate(recorded(job, fp64, monkeypatch)):
        moved = {int(name.split(".")[1]) for name, g in gradients.items() if name.endswith("B") and g.any()}
        without = 2 - len(moved)
        assert moved == set(range(without, 2))
        seen.add(without)
        kept = {n: v if int(n.split(".")[1]) >= without else 0.0 * v for n, v in before.items()}
        expected = loss_gradients(naive(fp64.folder, {0: serial()}, kept, torch.float64), job, step)
        for name, gradient in gradients.items():
            if int(name.split(".")[1]) >= without:
                assert (gradient - expected[name]).norm() <= 1e-9 * expected[name].norm(), name
    assert seen == {0, 1, 2}


def test_what_adapter_drop_drops_is_not_computed(fp64: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rueckle et al. 2021, section 3: neither the adapters of the first n layers, nor a backward below the first that
    is left; without any, no backward at all."""
    job = a_job("drop", "adapter-drop(4, upto=2)", seed=2, steps=14)
    pack = pack_of(fp64, [job])
    passed: list[int] = []
    reached: list[FrozenLinear] = []
    add, back, seen = steps.branch, PlainLinear.backward, set()  # type: ignore[attr-defined]

    def counted(x: Tensor, y: Tensor, A: Tensor, B: Tensor, segments: Segments, *rest: Any) -> Tensor:
        passed.extend(segment.rows for segment in segments)
        return add(x, y, A, B, segments, *rest)

    def noted(linear: PlainLinear, *rest: Any) -> Any:
        reached.append(linear)
        return back(linear, *rest)

    monkeypatch.setattr(steps, "branch", counted)
    monkeypatch.setattr(PlainLinear, "backward", noted)
    while not pack.jobs["drop"].finished:
        passed.clear()
        reached.clear()
        running = pack.jobs["drop"]
        without = running.key % 3
        rows = sum(job.train[i].rows for i in job.micro_batches(running.step)[running.micro])
        pack.step()
        assert passed == [rows] * 2 * (2 - without)
        assert len(reached) == 4 * (2 - without)  # of a layer: q, k and v as one; o; gate and up; down
        seen.add(without)
    assert seen == {0, 1, 2}


def test_adapter_drop_is_served_without_as_many_layers_as_asked(fp64: Backbone) -> None:
    graft = BoundGraft(parse("adapter-drop(4, upto=2, drop=1)"), fp64.shape)
    values = random_tensors(graft, 0)
    plain, operands = lower(graft, values, fp64.weight)
    assert {name.split(".")[1] for name in operands} == {"1"}
    assert torch.equal(operands["0.1.ffn.out.B"], values["0.1.ffn.out.B"])
    ids = torch.arange(5, 29)
    kept = {name: value if name.startswith("0.1.") else 0 * value for name, value in values.items()}
    expected = naive(fp64.folder, {0: serial()}, kept, torch.float64).logits(ids)
    for one, held in ((plain, operands), (graft, values)):
        assert (unmerged(one, held, fp64, ids) - expected).norm() <= 1e-9 * expected.norm()
    with pytest.raises(SpecError, match="drop: 2 leaves no adapter"):
        BoundGraft(parse("adapter-drop(4, upto=2, drop=2)"), fp64.shape)


def test_averaged_adapters_train_one_way_down_and_one_up_at_a_time(
    fp64: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, pairs = a_job("mix", "averaged-adapters(4, experts=3)", seed=1, steps=12), set()
    for before, gradients in recorded(job, fp64, monkeypatch):
        for layer in (0, 1):
            used = [gradients[f"0.{layer}.ffn.out.{part}"].view(3, 4, -1).flatten(1).any(1) for part in "AB"]
            assert int(used[1].sum()) == 1
            if before[f"0.{layer}.ffn.out.B"].any():  # else no gradient reaches A
                pairs.add((layer, int(used[0].int().argmax()), int(used[1].int().argmax())))
    assert len(pairs) >= 8 and {down for _, down, _ in pairs} == {up for _, _, up in pairs} == {0, 1, 2}

"""The counts of a step: what they count, and that nothing pretended is among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_counts
import torch

from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from tests.compiled import compiled
from tests.fake_gpu import DEVICE, fake_gpu

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def test_calls_are_counted_and_what_pretends_a_device_is_not() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return once(once(x))

    def once(x: torch.Tensor) -> torch.Tensor:
        return x.mul(2)

    with step_counts.counted() as real:
        twice(torch.ones(2))
    with fake_gpu() as gpu:
        x = torch.ones(2, device=DEVICE)
        with step_counts.counted() as fake, gpu.watch() as watched:
            twice(x)
    own = [sum(calls for who, calls in found.python.items() if who != "python") for found in (real, fake)]
    assert own == [3, 3]
    assert watched.operations == {"mul": 2} and watched.launches == 2


def test_every_step_is_counted_on_both_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_counts, "GRAFTS", 2)
    monkeypatch.setattr(step_counts, "STREAMS", 4)
    files = step_counts.backbone_files(tmp_path, layers=2)
    on_cpu = step_counts.steps(files, None)
    with fake_gpu() as gpu:
        on_gpu = step_counts.steps(files, gpu)
    for found in (on_cpu, on_gpu):
        assert found["bare"].total < found["mixed"].total < found["training"].total
        assert all(0 < step.forward <= step.python < step.total for step in found.values())
    for step in on_gpu.values():
        assert step.device is not None and step.forward_device is not None
        assert step.device["operations"] and step.device["programs"] and not step.forward_device["reads"]
    reads = on_gpu["training"].device
    assert reads is not None and sum(reads["reads"].values()) == 1 + step_counts.GRAFTS  # losses, and every norm


@compiled
@pytest.mark.parametrize(("mixed", "most"), [(False, 4000), (True, 6000)])
def test_a_decoding_step_calls_few_functions_from_python(mixed: bool, most: int, tmp_path: Path) -> None:
    """Of as many layers as SmolLM2 has, from two and four: what a layer adds is always the same."""
    calls = []
    for layers in (2, 4):
        files = step_counts.backbone_files(tmp_path / str(layers), layers)
        backbone = Backbone.load(files, best_dtype())
        calls.append(step_counts.decoding(backbone, files / "data", mixed=mixed, gpu=None).total)
    two, four = calls
    assert 0 < two + (four - two) // 2 * (step_counts.LAYERS - 2) <= most

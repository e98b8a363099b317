"""A pack whose backbone lies on a GPU computes there: `tests.fake_gpu` has one without values, so that all is known but
the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import fake_tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import GraftSpec
from polygraft.trainers import checkpoint
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner
from tests.fake_gpu import DEVICE, FakeGpu, fake_gpu
from tests.grafts.oracle.row import Row
from tests.grafts.oracle.table import ALL
from tests.tiny import TINY

SAMPLES = tuple(Sample(tuple(range(3, 3 + n)), (0.0,) * 4 + (1.0,) * (n - 4)) for n in (8, 9))
# One for each op and kind of form, and those with starts or hooks of their own.
DAILY = (
    "dora",
    "ia3",
    "pvera",
    "job-gated-experts",
    "fusion",
    "loha",
    "moved-rows",
    "hra",
    "boft",
    "road",
    "trainable-tokens",
    "dept",
    "smop",
    "llama-adapter",
    "apt",
    "loreft",
    "adalora",
    "lora-dropout",
    "diff-pruning",
    "child-tuning",
    "eva",
    "lora-ga",
)


def methods() -> list[ParameterSet]:
    return [pytest.param(name, marks=[] if name in DAILY else [pytest.mark.nightly]) for name in ALL]


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as machine:
        yield machine


@pytest.fixture(scope="module")
def backbone(gpu: FakeGpu, folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32, training=True, device=DEVICE)


@pytest.fixture
def pack(backbone: Backbone) -> PackRunner:
    return PackRunner(backbone)


def job(name: str, spec: GraftSpec) -> TrainJob:
    return TrainJob(name, BoundGraft(spec, TINY), TrainConfig(epochs=1, batch_size=2, learning_rate=1e-3), SAMPLES)


def devices(tensors: Mapping[str, Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors.values()}


def test_a_step_of_several_jobs_stays_on_the_device(pack: PackRunner, gpu: FakeGpu) -> None:
    """The host waits for the losses, once, and for every job's norm, which says whether its step is taken."""
    texts = (
        "lora(r=4, dropout=0.1)",
        "dora(r=4, at=attn.v)",
        "prefix(5) + ia3",
        "cpt(ids=5|6|7)",
        "shira(r=2)@0",
        "hra(r=2)@1",
    )
    for text in texts:
        pack.admit(job(text, parse(text)))
    reads, launches = gpu.reads, gpu.launches
    done = pack.step()
    assert [stepped.job for stepped in done.stepped] == list(texts)
    assert gpu.reads - reads == 1 + len(texts) and gpu.launches > launches
    for running in pack.jobs.values():
        slab = running.slab
        parts = {"master": slab.master, "moment": slab.exp_avg, "square": slab.exp_avg_sq}
        assert devices({**slab.tensors, **parts}) == {DEVICE}


def test_a_job_without_a_backward_steps_there(pack: PackRunner, gpu: FakeGpu) -> None:
    pack.admit(job("probed", parse("lora(r=4) + mezo")))
    reads = gpu.reads
    assert [stepped.job for stepped in pack.step().stepped] == ["probed"]
    assert gpu.reads - reads == 2


@pytest.mark.parametrize("name", methods())
def test_every_method_is_started_and_trained_there(name: str, pack: PackRunner) -> None:
    row: Row = ALL[name]
    running = pack.admit(job(name, row.spec), row.sources(pack.backbone.shape))
    assert [stepped.job for stepped in pack.step().stepped] == [name]
    assert devices(running.slab.tensors) == {DEVICE}


def test_a_checkpoint_passes_through_the_cpu(pack: PackRunner, tmp_path: Path) -> None:
    running = pack.admit(job("kept", parse("vera(r=4)@0")))
    pack.step()
    name = checkpoint.save(tmp_path, running)
    assert devices(load_file(tmp_path / name / "slab.safetensors")) == {torch.device("cpu")}
    again = checkpoint.load(tmp_path, name, running.job, pack.backbone.device)
    assert devices({**again.slab.tensors, "moment": again.slab.exp_avg}) == {DEVICE}
    pack.remove("kept")
    pack.restore(again)
    assert pack.evaluate("kept", SAMPLES) == 1.0  # what is read there is 1


def test_what_lies_elsewhere_is_found_out(gpu: FakeGpu) -> None:
    """That these tests can fail: a mixed operation, and a value that the host would have to wait for."""
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(4, 4) @ torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(fake_tensor.DataDependentOutputException):
        float(torch.zeros(4, device=DEVICE).sum())
    with pytest.raises(fake_tensor.DynamicOutputShapeException):
        torch.zeros(4, device=DEVICE).nonzero()

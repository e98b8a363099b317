"""A job ends with the same bits whoever shares its pack, joins it, leaves it, fails in it or runs out of memory in
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import ModelShape
from polygraft.kernels.dense import op as dense
from polygraft.trainers.failure import Failed
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.lanes import gradient
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_backward
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from tests.tiny import TINY

METHODS = {
    "lora": "lora(r=8, dropout=0.2)",
    "rslora": "rslora(r=4, at=attn.[qv]|ffn.down)@1",
    "dora": "dora(r=4)",
    "ia3": "ia3",
    "prefix": "prefix(5)",
    "bitfit": "bitfit",
    "serial": "serial(8)",
    "parallel": "parallel(16)",
}
# The same eight, at fewer sites where they are slow.
LIGHT = {**METHODS, "lora": "lora(r=8, at=attn.[qv], dropout=0.2)", "dora": "dora(r=4, at=attn.v|ffn.down)"}
# Neighbours that once changed others: a projection's input of their own, slots in another order, the same op twice.
AWKWARD = {
    "fused": "ia3(at=attn.o, feedforward=attn.q|ffn.up)",
    "union": "bitfit(at=attn.*) + ia3 + lora(r=2, at=attn.*) + parallel(4, at=attn.v|ffn.out)",
    "twice": "lora(r=3) + lora(r=5, at=attn.q) + prefix(2)",
}
SHORT = 10
EXAMPLES = 6  # of each job of a pack: with every batch size whole epochs make six steps, and not up to ten
MAX_ROWS = 140  # less than all jobs' micro-batches together, so that the company changes from step to step


@cache
def backbone_of(folder: Path, dtype: torch.dtype) -> Backbone:
    return Backbone.load(folder, dtype, training=True)  # as the pack worker does


@pytest.fixture
def fp32(one_thread: None, folder: Path) -> Backbone:
    return backbone_of(folder, torch.float32)


def a_job(name: str, text: str, *, seed: int, steps: int, shape: ModelShape = TINY, count: int = 9) -> TrainJob:
    """Own data, lengths, batch size, rate, schedule and epochs; at least `steps` optimiser steps."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(3, 24, (1,), generator=generator))
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        muted = int(torch.randint(1, length, (1,), generator=generator))
        samples.append(Sample(tuple(ids), (0.0,) * muted + (1.0,) * (length - muted)))
    batch = 1 + seed % 4
    config = TrainConfig(
        epochs=ceil(steps / ceil(len(samples) / batch)),
        batch_size=batch,
        learning_rate=3e-3 * (1 + seed % 3),
        schedule=("linear", "cosine", "constant")[seed % 3],
        warmup_ratio=0.1 * (seed % 2),
        weight_decay=0.01 * (seed % 4),
        seed=seed,
        micro_rows=40,
    )
    return TrainJob(name, BoundGraft(parse(text), shape), config, tuple(samples))


def jobs_of(steps: int, texts: Mapping[str, str], shape: ModelShape = TINY, count: int = EXAMPLES) -> list[TrainJob]:
    named = enumerate(texts.items())
    return [a_job(name, text, seed=seed, steps=steps, shape=shape, count=count) for seed, (name, text) in named]


def run(
    pack: PackRunner, between: Callable[[PackRunner], None] = lambda _: None, failures: list[Failed] | None = None
) -> dict[str, Tensor]:
    """Step until no job is left; the weights of those that finished. `between` runs before every step.

    Jobs that fail leave; that is an error unless there is a list of `failures` to note it in.
    """
    ended: dict[str, Tensor] = {}
    while pack.jobs:
        between(pack)
        for failed in pack.step().failed:
            assert failures is not None, failed
            failures.append(failed)
            pack.remove(failed.job)
        for running in [running for running in pack.jobs.values() if running.finished]:
            ended[running.job.id] = pack.remove(running.job.id).slab.master.clone()
    return ended


def pack_of(backbone: Backbone, jobs: Sequence[TrainJob]) -> PackRunner:
    """A pack of these jobs, each with its loss before training known, as the worker asks for it."""
    pack = PackRunner(backbone, max_rows=MAX_ROWS)
    for job in jobs:
        pack.admit(job)
        pack.evaluate(job.id, job.train[:1])
    return pack


@cache
def alone(backbone: Backbone, job: TrainJob) -> Tensor:
    return run(pack_of(backbone, [job]))[job.id]


def assert_as_alone(ended: Mapping[str, Tensor], jobs: Sequence[TrainJob], backbone: Backbone) -> None:
    assert ended.keys() == {job.id for job in jobs}
    differing = [job.id for job in jobs if not torch.equal(ended[job.id], alone(backbone, job))]
    assert not differing


@pytest.mark.parametrize("name", METHODS)
def test_fp64_gradients_beside_three_other_methods_are_those_alone(name: str, folder: Path, one_thread: None) -> None:
    backbone = backbone_of(folder, torch.float64)
    place = list(METHODS).index(name)
    company = [list(METHODS)[(place + offset) % len(METHODS)] for offset in (3, 6, 0, 1)]
    packed = gradients(backbone, company)[name]
    for tensor, expected in gradients(backbone, [name])[name].items():
        assert expected.norm() > 0, f"{tensor} plays no part"
        assert (packed[tensor] - expected).norm() <= 1e-9 * expected.norm(), tensor


def gradients(backbone: Backbone, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Of every graft's tensors after one packed forward and backward, from random values."""
    jobs = {name: a_job(name, METHODS[name], seed=list(METHODS).index(name), steps=1) for name in names}
    residents, micro_batches = [], []
    for graft, (name, job) in enumerate(jobs.items()):
        generator = torch.Generator().manual_seed(job.config.seed)
        values = {
            t.name: 0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64) + (t.part in "gm")
            for t in job.graft.tensors
        }
        residents.append(Resident(name, job.graft, values))
        seed = job.config.seed
        micro_batches.append(
            MicroBatch(graft, job.graft.prefix_length, job.train[:4], (0, 1, 2, 3), 10.0 + seed, key=seed)
        )
    stacks = backbone.stacks(residents, trainable=True)
    forward_backward(backbone, stacks, micro_batches)
    found: dict[str, dict[str, Tensor]] = {}
    for name, pieces in zip(jobs, stacks.views, strict=True):
        parts = {piece.tensor.name: piece.gradient() for piece in pieces}
        found[name] = {tensor: part.clone() for tensor, part in parts.items() if part is not None}
        assert found[name].keys() == parts.keys()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [LIGHT], ids=["all"])
@pytest.mark.equality("packed")
def test_a_hundred_steps_in_company_leave_the_bits_of_a_hundred_steps_alone(
    texts: dict[str, str], dtype: torch.dtype, folder: Path
) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(100, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_so_do_steps_in_bf16_with_torchs_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "library", lambda: None)
    backbone, jobs = Backbone.load(folder, torch.bfloat16, training=True), jobs_of(SHORT, LIGHT)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_unions_and_input_scales_change_no_neighbour(fp32: Backbone) -> None:
    jobs = jobs_of(SHORT, {**METHODS, **AWKWARD})
    assert_as_alone(run(pack_of(fp32, jobs)), jobs, fp32)


@pytest.mark.parametrize("poison", ["nan weights", "infinite rate"])
def test_a_job_whose_loss_is_not_finite_fails_alone(poison: str, fp32: Backbone) -> None:
    jobs = jobs_of(SHORT, METHODS)
    bad = a_job("bad", "lora(r=8) + bitfit + prefix(3)", seed=20, steps=200)
    pack = pack_of(fp32, jobs[:4])
    if poison == "nan weights":
        slab = Slab(bad.graft)
        slab.master.fill_(torch.nan)
        pack.restore(RunningJob(bad, slab))
    else:
        pack.admit(replace(bad, config=TrainConfig(epochs=200, batch_size=2, learning_rate=1e30)))
    for job in jobs[4:]:
        pack.admit(job)
    failures: list[Failed] = []
    steps: list[int] = []
    ended = run(pack, lambda pack: steps.append(pack.jobs["bad"].step) if "bad" in pack.jobs else None, failures)
    assert max(steps) < 200
    assert [(failed.job, failed.code) for failed in failures] == [("bad", "non_finite_loss")]
    assert "learning_rate" in failures[0].message
    assert_as_alone(ended, jobs, fp32)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_job_too_short_for_patience_fails_if_none_of_its_steps_was_finite(steps: int, fp32: Backbone) -> None:
    bad = a_job("bad", "lora(r=8)", seed=20, steps=200)
    slab = Slab(bad.graft)
    slab.master.fill_(torch.nan)
    pack = PackRunner(fp32)
    short = TrainConfig(epochs=steps, batch_size=len(bad.train), learning_rate=1e-3)
    pack.restore(RunningJob(replace(bad, config=short), slab))
    failures: list[Failed] = []
    assert not run(pack, failures=failures)
    assert [(failed.job, failed.code) for failed in failures] == [("bad", "non_finite_loss")]
    assert f"{steps} steps in a row" in failures[0].message


def test_joining_late_and_leaving_early_change_nothing_for_the_others(fp32: Backbone) -> None:
    jobs = jobs_of(SHORT, METHODS, count=9)
    gone = a_job("gone", "parallel(8) + lora(r=8)", seed=30, steps=200)
    pack = pack_of(fp32, [jobs[0], gone, *jobs[1:4]])
    late = {3: jobs[4], 9: jobs[5], 10: jobs[6], 25: jobs[7]}

    def between(pack: PackRunner) -> None:
        if pack.steps in late:
            pack.admit(late.pop(pack.steps))
        if pack.steps == 17:
            assert pack.remove("gone").step > 0

    assert_as_alone(run(pack, between), jobs, fp32)


@pytest.mark.parametrize("message", ["", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"])
def test_micro_batches_that_do_not_fit_together_run_apart(
    message: str, fp32: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, calls = jobs_of(SHORT, METHODS)[2:7], []

    def small(backbone: Backbone, stacks: object, micro_batches: Sequence[MicroBatch]) -> list[float]:
        calls.append(len(micro_batches))
        losses = forward_backward(backbone, stacks, micro_batches)  # type: ignore[arg-type]
        if len(micro_batches) > 2:  # after the work, so that what it left behind could be counted twice
            raise RuntimeError(message) if message else MemoryError
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(gradient, "forward_backward", small)
        ended = run(pack_of(fp32, jobs))
    assert max(calls) > 2
    assert_as_alone(ended, jobs, fp32)


def test_the_job_that_does_not_fit_alone_is_found_and_fails_alone(
    fp32: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(SHORT, METHODS)
    big = a_job("big", "lora(r=7)", seed=40, steps=200)

    def full(backbone: Backbone, stacks: object, micro_batches: Sequence[MicroBatch]) -> list[float]:
        if any(sample in big.train for one in micro_batches for sample in one.samples):
            raise MemoryError
        return forward_backward(backbone, stacks, micro_batches)  # type: ignore[arg-type]

    failures: list[Failed] = []
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "forward_backward", full)
        ended = run(pack_of(fp32, [*jobs[:3], big, *jobs[3:]]), failures=failures)
    assert [(failed.job, failed.code) for failed in failures] == [("big", "out_of_memory")]
    assert_as_alone(ended, jobs, fp32)


def test_another_error_is_not_taken_for_a_lack_of_memory(fp32: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> list[float]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(gradient, "forward_backward", wrong)
    done = pack_of(fp32, jobs_of(1, METHODS)).step()
    assert done.jobs and [failed.job for failed in done.failed] == list(done.jobs)
    for failed in done.failed:
        assert failed.code == "step_failed" and "RuntimeError: shapes do not match" in failed.message

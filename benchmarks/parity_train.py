"""Packed training: starting values, every loss and norm, and every tensor at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from parity_models import CAUSAL, VOCAB, model
from parity_names import (
    Backbone,
    PackRunner,
    Sample,
    Source,
    attribute,
    graft_of,
    job_of,
    named,
    source_names,
    start_of,
    trained_names,
)
from parity_record import Record
from parity_texts import Texts
from torch import Tensor

_JOBS, _MAX_ROWS = 12, 200  # of a pack; fewer rows than all jobs' micro-batches together
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def methods(record: Record, root: Path, texts: Texts) -> None:
    """Every method in float32, and a good part of them in bf16."""
    for name, chosen in (("fp32", texts.of("methods")), ("bf16", texts.some(2))):
        backbone = Backbone.load(model(root, "llama"), _TYPES[name], training=True)
        train(record, f"train/{name}", backbone, chosen, texts)


def dropped_and_united(record: Record, root: Path, texts: Texts) -> None:
    """Dropout of every method that takes it, and grafts of several methods."""
    for name, dtype in _TYPES.items():
        backbone = Backbone.load(model(root, "llama"), dtype, training=True)
        train(record, f"dropped/{name}", backbone, texts.of("dropped and united"), texts)


def with_torchs_products(record: Record, root: Path, texts: Texts) -> None:
    """bf16 as on a machine without the compiled products."""
    with patch.object(named("kernels.dense.op"), "library", lambda: None):
        backbone = Backbone.load(model(root, "llama"), torch.bfloat16, training=True)
        chosen = dict(list(texts.some(8).items())[:_JOBS])
        train(record, "fallback/bf16", backbone, chosen, texts)


def without_a_backward(record: Record, root: Path, texts: Texts) -> None:
    """MeZO beside jobs with a backward."""
    beside = dict(list(texts.of("dropped and united").items())[:3])
    for name, dtype in _TYPES.items():
        backbone = Backbone.load(model(root, "llama"), dtype, training=True)
        train(record, f"mezo/{name}", backbone, {**texts.of("mezo"), **beside}, texts)


def quantised(record: Record, root: Path, texts: Texts) -> None:
    """On a backbone in NF4."""
    for name, dtype in _TYPES.items():
        backbone = Backbone.load(model(root, "llama"), dtype, training=True, quantise="nf4")
        train(record, f"nf4/{name}", backbone, texts.of("nf4"), texts)


def architectures(record: Record, root: Path, texts: Texts) -> None:
    """A handful of methods on every other decoder."""
    for arch in texts.architectures(CAUSAL):
        for name in ("fp32", "bf16") if arch in ("gpt2", "gemma2", "qwen3") and not texts.quick else ("fp32",):
            backbone = Backbone.load(model(root, arch), _TYPES[name], training=True)
            train(record, f"architectures/{arch}/{name}", backbone, texts.of("architectures"), texts)


def samples_of(seed: int, count: int = 6) -> tuple[Any, ...]:
    """Random samples of 4 to 21 tokens, the first of which are not learned."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(4, 22, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        muted = int(torch.randint(1, length - 1, (1,), generator=generator))
        samples.append(Sample(tuple(ids), (0.0,) * muted + (1.0,) * (length - muted)))
    return tuple(samples)


def sources_of(text: str, backbone: Any, texts: Texts) -> Mapping[str, Any]:
    """Trained grafts for a method over others, by the names that its text says."""
    members = texts.members.get(text, "lora")
    return {
        name: Source(graft_of(members, backbone), grown(members, backbone, seed, texts))
        for seed, name in enumerate(source_names(text, backbone))
    }


def grown(text: str, backbone: Any, seed: int, texts: Texts) -> Mapping[str, Tensor]:
    """A graft's tensors as after some training, whose arithmetic plays no part: starting values and noise on them."""
    start = start_of(text, backbone, seed, samples_of(seed), sources_of(text, backbone, texts))
    trained, generator = trained_names(text, backbone), torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if name in trained else value
        for name, value in start.items()
    }


def train(record: Record, prefix: str, backbone: Any, chosen: Mapping[str, str], texts: Texts) -> None:
    """Packs of these jobs, six optimiser steps each."""
    jobs = tuple(chosen.items())
    for first in range(0, len(jobs), _JOBS):
        with record.item(f"{prefix}/pack {first // _JOBS}"):
            _pack(record, prefix, backbone, jobs[first : first + _JOBS], texts)


def admitted(
    record: Record, prefix: str, pack: Any, group: Sequence[tuple[str, str]], texts: Texts, seed: int = 0
) -> None:
    """Take the jobs in, and record what they start as."""
    for place, (name, text) in enumerate(group, seed):
        with record.item(f"{prefix}/{name}"):
            job = job_of(
                name,
                text,
                pack.backbone,
                samples_of(place),
                epochs=2,
                batch_size=2,
                learning_rate=0.01 * (1 + place % 2),
                schedule=("linear", "cosine", "constant")[place % 3],
                warmup_ratio=0.2 * (place % 2),
                weight_decay=0.01 * (place % 4),
                seed=place,
                micro_rows=24,
            )
            active = pack.admit(job, sources_of(text, pack.backbone, texts))
            for tensor, value in active.slab.tensors.items():
                record.put(f"{prefix}/{name}/start/{tensor}", value)
            record.put(f"{prefix}/{name}/loss before", pack.evaluate(name, job.train[:2]))


def _pack(record: Record, prefix: str, backbone: Any, group: Sequence[tuple[str, str]], texts: Texts) -> None:
    pack = PackRunner(backbone, max_rows=_MAX_ROWS)
    admitted(record, prefix, pack, group, texts)
    while pack.jobs:
        done = pack.step()
        stepped_of(record, prefix, done)
        for failed in done.failed:
            record.put(f"{prefix}/{failed.job}/failed", failed.code)
        ended = [name for name, job in pack.jobs.items() if job.finished] + [failed.job for failed in done.failed]
        for name in dict.fromkeys(ended):
            slab = pack.remove(name).slab
            for tensor, value in slab.tensors.items():
                record.put(f"{prefix}/{name}/end/{tensor}", value)
            record.put(f"{prefix}/{name}/moments", [slab.exp_avg, slab.exp_avg_sq])


def stepped_of(record: Record, prefix: str, done: Any) -> None:
    """Loss, norm and rate of every optimiser step that a packed step took, and who rode in it."""
    company = (done.number, done.rows, *done.jobs)
    record.put(f"{prefix}/company/{'+'.join(sorted(done.jobs))[:60]}/{done.number}", company)
    for stepped in done.stepped:
        step = f"{prefix}/{stepped.job}/step {stepped.step}"
        record.put(f"{step}/loss", stepped.loss)
        record.put(f"{step}/norm", attribute(stepped, "norm", "grad_norm"))
        record.put(f"{step}/rate", stepped.learning_rate)
        record.put(f"{step}/skipped", int(stepped.skipped))

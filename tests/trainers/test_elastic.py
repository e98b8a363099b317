"""Supernets: a step trains the subnet that it draws, and nothing else; the same bits in any company; subnets start from
their first rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.elastic import check, cut, subnet
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.trainers.job import TrainJob
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from tests.grafts.oracle.row import random_tensors
from tests.tiny import TINY
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, backbone_of, jobs_of, pack_of, run

NOAH = "lora(r=8, at=attn.[qv]) + serial(8, at=ffn.out) + prefix(6) + elastic(sizes=2|4|6|8, groups=2)"
NLS = "lora(r=6, at=attn.*|ffn.down, dropout=0.1) + elastic(sizes=6|4|2, groups=2, depth=all)"
METHODS = {"elastic": NOAH, "elastic nls": NLS, "lora": "lora(r=2)", "prefix": "prefix(3)"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [METHODS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], dtype: torch.dtype, folder: Path, steps: int, one_thread: None
) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


@pytest.mark.parametrize("text", [NOAH, NLS.replace(", dropout=0.1", "")], ids=["noah", "nls"])
def test_a_step_moves_the_subnet_that_it_draws_as_a_job_of_that_subnet_is_moved(text: str, fp64: Backbone) -> None:
    """From the same values and with the same samples: the first step of AdamW, and 0 everywhere else."""
    whole = a_job("whole", text, seed=2, steps=1)
    whole = replace(whole, config=replace(whole.config, weight_decay=0.0, max_grad_norm=1e9))
    values = random_tensors(whole.graft, 5)
    small = replace(whole, id="small", graft=subnet(whole.graft, whole.key(0)))
    names = cut(small.graft, whole.graft)
    sliced = {t.name: values[names[t.name]][: t.shape[0]] for t in small.graft.tensors}
    moved: dict[str, dict[str, torch.Tensor]] = {}
    for job, start in ((whole, values), (small, sliced)):
        slab = Slab(job.graft, torch.float64)
        slab.fill(start)
        pack = PackRunner(fp64)
        running = pack.restore(RunningJob(job, slab))
        while not running.step:
            pack.step()
        moved[job.id] = {name: value.clone() for name, value in slab.tensors.items()}
    left = {name: moved["whole"][name] - value for name, value in values.items()}
    for tensor in small.graft.tensors:
        of, rows = names[tensor.name], tensor.shape[0]
        assert torch.equal(moved["whole"][of][:rows], moved["small"][tensor.name])
        assert left[of][:rows].abs().max() > 0
        left[of][:rows] = 0
    assert all(not value.any() for value in left.values())


def test_every_size_and_depth_is_drawn_and_never_nothing() -> None:
    graft, seen = BoundGraft(parse(NOAH), TINY), Counter[str]()
    for draw in range(300):
        found = subnet(graft, draw)
        seen.update(found.spec.method.split(" + "))
        cut(found, graft)
    for size in (2, 4, 6, 8):
        assert seen[f"lora(r={size}, at=attn.[qv])@0"] > 20 and seen[f"serial(size={size}, at=ffn.out)@1"] > 10
    assert not any("prefix(length=8" in text for text in seen), "larger than the supernet's own"
    assert seen["prefix(length=6)@0,1"] > 20 and seen["prefix(length=6)@0"] > 20
    everywhere = BoundGraft(parse(NLS), TINY)
    assert all(len(subnet(everywhere, draw).spec.slots) == 2 for draw in range(20))


def test_a_job_starts_from_the_first_rows_of_a_supernet(fp64: Backbone) -> None:
    supernet = BoundGraft(parse(NOAH), TINY)
    source = Source(supernet, random_tensors(supernet, 3))
    text = "lora(r=4, at=attn.[qv])@1 + prefix(2)@0"
    job = replace(a_job("cut", f"{text} + from(of=net@1)", seed=1, steps=1))
    pack = PackRunner(fp64)
    slab = pack.admit(job, {"net@1": source}).slab
    for tensor, of in cut(job.graft, supernet).items():
        assert torch.equal(slab.tensors[tensor], source.tensors[of][: slab.tensors[tensor].shape[0]])
    loss = pack.evaluate("cut", job.train)
    pack.remove("cut")
    alone = Slab(BoundGraft(parse(text), TINY), torch.float64)
    alone.fill(slab.tensors)
    pack.restore(RunningJob(_of(job, text), alone))
    assert pack.evaluate("plain", job.train) == loss


def _of(job: TrainJob, text: str) -> TrainJob:
    return replace(job, id="plain", graft=BoundGraft(parse(text), TINY))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("lora(r=4) + elastic", "none is as small as lora's r of 4"),
        ("dora(r=8) + elastic(sizes=2)", "elastic: a norm is not rows"),
        ("vera(r=8) + elastic(sizes=2)", "elastic: a branch is not rows"),
        ("lora(r=8) + mezo + elastic(sizes=2)", "leave out mezo"),
    ],
)
def test_what_has_no_sizes_to_be_cut_to_is_no_supernet(text: str, wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong):
        check(parse(text))


@pytest.mark.parametrize("arguments", ["sizes=0", "sizes=a|b", "sizes=", "groups=0", "depth=some"])
def test_sizes_that_are_none_are_refused(arguments: str) -> None:
    with pytest.raises(SpecError, match=r"peft: elastic\."):
        parse(f"lora + elastic({arguments})")

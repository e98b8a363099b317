"""Methods over grafts that were trained before: the same bits in any company, and the others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sources import Source
from polygraft.trainers.job import TrainJob
from polygraft.trainers.runner import PackRunner
from tests.grafts.oracle.row import random_tensors
from tests.trainers.test_packed_equals_alone import MAX_ROWS, a_job, backbone_of, jobs_of, pack_of, run

MEMBERS = {
    "lora": "lora(r=2, at=attn.[qv])",
    "other": "rslora(r=3, at=attn.v)",
    "adapter": "serial(4, at=ffn.out)",
    "prompt": "prompt(3)",
    "second": "prompt(3)",
    "tuned": "bitdelta(at=attn.v)",
}
METHODS = {
    "meteora": "meteora(r=3, at=attn.[qv], of=lora|other)",
    "output-gated-loras": "output-gated-loras(r=3, at=attn.[qv], of=lora|other)",
    "o-lora": "o-lora(r=3, at=attn.[qv], old=3, of=lora|other)",
    "fusion": "fusion(4, of=adapter|adapter@2)",
    "spot": "spot(3, of=prompt|second)",
    "ipt": "ipt(3, d=1, of=prompt|second)",
    "on": "lora(r=2, at=attn.[qv], dropout=0.1) + from(of=lora)",
    "bitdelta": "bitdelta(at=attn.v, of=tuned)",
}


def sources_of(backbone: Backbone) -> dict[str, Source]:
    found = {}
    for seed, (name, text) in enumerate({**MEMBERS, "adapter@2": MEMBERS["adapter"]}.items()):
        graft = BoundGraft(parse(text), backbone.shape)
        values = random_tensors(graft, seed)
        found[name] = Source(graft, {tensor: value.float() for tensor, value in values.items()})
    return found


def packed(backbone: Backbone, jobs: Sequence[TrainJob]) -> PackRunner:
    pack = PackRunner(backbone, max_rows=MAX_ROWS)
    for job in jobs:
        pack.admit(job, sources_of(backbone))
    return pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [METHODS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, folder: Path
) -> None:
    backbone = backbone_of(folder, dtype)
    jobs = jobs_of(steps, texts)
    ended = run(packed(backbone, jobs))
    differing = [job.id for job in jobs if not torch.equal(ended[job.id], run(packed(backbone, [job]))[job.id])]
    assert not differing


def test_the_others_stay_as_they_were_and_what_is_trained_moves(folder: Path) -> None:
    backbone = backbone_of(folder, torch.float32)
    pack = packed(backbone, jobs_of(6, METHODS))
    slabs = {name: running.slab for name, running in pack.jobs.items()}
    before = {name: {n: t.clone() for n, t in slab.tensors.items()} for name, slab in slabs.items()}
    run(pack)
    for name, slab in slabs.items():
        assert all(torch.equal(tensor, before[name][kept]) for kept, tensor in slab.frozen.items())
        assert all(not torch.equal(view, before[name][moved]) for moved, view in slab.views.items()), name
    members = sources_of(backbone)
    A, B = (before["meteora"][f"0.1.attn.v.{part}"] for part in "AB")
    assert torch.equal(A[:2], members["lora"].tensors["0.1.attn.v.A"]) and A[2].count_nonzero() == 0
    assert torch.allclose(B[3:], members["other"].tensors["0.1.attn.v.B"] * (16.0 / 3**0.5))
    assert before["meteora"]["0.1.attn.q.A"][3:].count_nonzero() == 0  # where `other` does not act


def test_a_job_goes_on_from_the_loss_that_its_source_ended_with(folder: Path) -> None:
    backbone = backbone_of(folder, torch.float32)
    pack = packed(backbone, jobs_of(1, {"spot": "spot(3, of=prompt)", "on": METHODS["on"]}))
    for job, source in (("spot", "prompt"), ("on", "lora")):
        given, own = sources_of(backbone)[source].tensors, pack.jobs[job].slab.tensors
        assert all(torch.equal(own[name], value) for name, value in given.items())
    mean = packed(backbone, [a_job("m", METHODS["spot"], seed=0, steps=1)]).jobs["m"].slab.tensors["0.0.embed.p"]
    prompts = [sources_of(backbone)[name].tensors["0.0.embed.p"] for name in ("prompt", "second")]
    assert torch.allclose(mean, (prompts[0] + prompts[1]) / 2)


def test_intrinsic_prompts_span_the_given_ones(folder: Path) -> None:
    """With as many dimensions as prompts less one, every given prompt is m + sum z_i D_i for some z."""
    backbone = backbone_of(folder, torch.float32)
    pack = packed(backbone, [a_job("x", "ipt(3, d=1, of=prompt|second)", seed=0, steps=1)])
    D, m, z = (pack.jobs["x"].slab.tensors[f"0.0.embed.{part}"] for part in "Dmz")
    assert z.tolist() == [0.0]
    for name in ("prompt", "second"):
        away = sources_of(backbone)[name].tensors["0.0.embed.p"] - m
        along = (away * D[0]).sum() / D[0].square().sum()
        assert torch.allclose(along * D[0], away, atol=1e-5) and abs(abs(float(along)) - 1.0) < 1e-4


def test_o_lora_keeps_away_from_what_the_others_span(folder: Path) -> None:
    """Beside a penalty the new A has less in common with the old ones than without (Wang et al. 2023, section 3)."""
    backbone = backbone_of(folder, torch.float32)

    def overlap(penalty: float) -> float:
        text = f"o-lora(r=3, at=attn.[qv], old=3, penalty={penalty}, of=lora|other)"
        pack = packed(backbone, [a_job("x", text, seed=0, steps=60)])
        values: Mapping[str, Tensor] = pack.jobs["x"].slab.tensors
        run(pack)
        pairs = [(values[name], values[f"{name}0"]) for name in values if name.endswith(".A")]
        return sum(float((old @ new.T).square().sum()) for new, old in pairs)

    assert overlap(10.0) < 0.1 * overlap(0.0)


def test_a_job_without_its_sources_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="of: graft 'lora' is not here"):
        pack_of(backbone_of(folder, torch.float32), jobs_of(1, {"meteora": METHODS["meteora"]}))

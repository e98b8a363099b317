"""Adapters with biases, norms and prompts end a packed training with the bits of one alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.trainers.hooks import Hooks
from tests.grafts.oracle.family_prompts import dept
from tests.grafts.oracle.row import Row
from tests.tiny import tiny_llama
from tests.trainers.solo import trained
from tests.trainers.test_lora_family import assert_trained, ours
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, jobs_of, pack_of, run

METHODS = {
    "lora": "lora(r=4)",
    "ssf": "ssf",
    "ln": "ln-tuning",
    "pfeiffer": "pfeiffer(8)",
    "houlsby": "serial(8, bias=1)",
    "adaptformer": "adaptformer(4)",
    "autopeft": "autopeft(3, 5, 2)",
    "beft": "beft",
    "beside": "parallel(3, at=attn.q|ffn.down, bias=1)",
    "scaled": "scaled-parallel(8)",
    "mam": "mam(length=3, size=8)",
    "loreft": "loreft(r=3)",
    "direft": "direft(r=2)@1",
    "noreft": "noreft(r=2, first=2, last=1)@1",
    "prefix-mlp": "prefix-mlp(length=4, hidden=16)",
    "llama-adapter": "llama-adapter(length=5)",
    "prompt": "prompt(5)",
    "p-tuning": "p-tuning(3, hidden=8, encoder=lstm)",
    "dpt": "dpt(4, r=2)",
    "mpt": "mpt(3)",
    "dept": "dept(2, rows=6, r=2)",
    "pruned-prompt": "pruned-prompt(6, pieces=4)",
    "cartridge": "cartridge(4)",
    "unipelt": "unipelt(r=2, size=4, length=3, hidden=8)",
    "apt": "apt(4) + lora(r=2)",
    "residual": "residual-prompt(3, size=8)",
    "smop": "smop(3, k=3)",
    "idpg": "idpg(2, hidden=6) + lora(r=2, dropout=0.1)",
    "edited": "trainable-tokens(5|77|300) + prefix(2) + prompt(3, start=vocabulary) + lora(r=2, dropout=0.1)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [METHODS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path), dtype, training=True)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_dept_trains_its_prompt_and_its_pair_at_two_rates(fp64: Backbone) -> None:
    """Shi & Lipani 2024, section 2.2: alpha_1 for the prompt and alpha_2 for A and B; a LoRA beside has the first."""
    job = a_job("dept", "dept(2, rows=6, r=2, ratio=40)", seed=3, steps=12)
    pack = pack_of(fp64, [job])
    start = {name: value.clone() for name, value in pack.jobs["dept"].slab.tensors.items()}
    oracle = Row("dept(2, rows=6, r=2)", soft=dept).oracle(fp64.folder, start, torch.float64)
    expected = trained(oracle, job, rate=lambda part: 1.0 if part == "p" else 1 / 40)
    assert_trained(ours(job, fp64), expected)
    beside = BoundGraft(parse("dept(2) + lora(r=2, at=attn.v)@0"), fp64.shape)
    rates = dict(zip((t.name for t in beside.trained), Hooks(beside, Slab(beside)).rates, strict=True))
    assert {name for name, rate in rates.items() if rate != 1.0} == {"1.0.embed.A", "1.0.embed.B"}


def test_a_pruned_prompt_keeps_what_mattered_most_rows_first_then_pieces(tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path), torch.float32, training=True)
    job = a_job("x", "pruned-prompt(6, keep=0.5, pieces=4, keep_pieces=0.25)", seed=0, steps=18)
    pack = pack_of(backbone, [job])
    values, mattered, seen = pack.jobs["x"].slab.tensors, {}, []
    while not pack.jobs["x"].finished:
        before = {name: value.clone() for name, value in values.items()}
        pack.step()
        rows, pieces = values["0.0.embed.rows"], values["0.0.embed.pieces"]
        seen.append((int(rows.sum()), int(pieces.sum())))
        for part, mask in (("rows", rows), ("pieces", pieces)):
            if mask.sum() < before[f"0.0.embed.{part}"].sum():
                mattered[part] = mask.bool(), values[f"0.0.embed.matter_{part}"].clone()
    total = job.steps_total
    assert seen[total // 3 - 2] == (6, 24) and seen[total // 3 - 1] == (3, 24)
    assert seen[2 * total // 3 - 2] == (3, 24) and seen[-1] == (3, 3)  # a quarter of the twelve pieces that were left
    kept, score = mattered["rows"]
    assert score[kept].min() >= score[~kept].max() > 0
    kept, score = mattered["pieces"]
    alive = values["0.0.embed.rows"].bool().expand_as(kept)
    assert not kept[~alive].any() and score[kept].min() >= score[alive & ~kept].max()

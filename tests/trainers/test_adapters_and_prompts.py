"""Adapters with biases, norms and prompts end a packed training with the bits of one alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.runtime.backbone import Backbone
from tests.tiny import tiny_llama
from tests.trainers.test_packed_equals_alone import assert_as_alone, jobs_of, run, together

METHODS = {
    "lora": "lora(r=4)",
    "ssf": "ssf",
    "ln": "ln-tuning",
    "pfeiffer": "pfeiffer(8)",
    "houlsby": "serial(8, bias=1)",
    "beside": "parallel(3, at=attn.q|ffn.down, bias=1)",
    "scaled": "scaled-parallel(8)",
    "mam": "mam(length=3, size=8)",
    "loreft": "loreft(r=3)",
    "direft": "direft(r=2)@1",
    "prefix-mlp": "prefix-mlp(length=4, hidden=16)",
    "llama-adapter": "llama-adapter(length=5)",
    "prompt": "prompt(5)",
    "p-tuning": "p-tuning(3, hidden=8, encoder=lstm)",
    "dept": "dept(2, rows=6, r=2)",
    "edited": "trainable-tokens(5|77|300) + prefix(2) + prompt(3, start=vocabulary) + lora(r=2, dropout=0.1)",
}
STEPS = 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_twenty_steps_in_company_leave_the_bits_of_twenty_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path), dtype, training=True)
    jobs = jobs_of(STEPS, METHODS)
    assert_as_alone(run(together(backbone, jobs)), jobs, backbone)

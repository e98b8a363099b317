"""Late prompts, whose rows run through the frozen layers job by job, leave the bits of as many trained alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pretrained import Quantise
from tests.tiny import tiny_llama, tiny_model
from tests.trainers.test_packed_equals_alone import assert_as_alone, jobs_of, pack_of, run

METHODS = {
    "lora": "lora(r=4)",
    "late": "lpt(5)@2-3",
    "later": "lpt(18)@3 + lora(r=2, dropout=0.1)",
    "early": "lpt(3)",
    "with virtual tokens": "lpt(4)@1-3 + prompt(2)",
    "prefix": "prefix(4)@2-3",
}


@pytest.mark.parametrize(
    ("dtype", "quantise"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "nf4")],
    ids=["fp32", "bf16", "nf4"],
)
@pytest.mark.parametrize("texts", [METHODS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, quantise: Quantise | None, tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path, layers=4), dtype, training=True, quantise=quantise)
    jobs = jobs_of(steps, texts, backbone.shape)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_steps_under_learned_positions_do_too(steps: int, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_model(tmp_path, "gpt2"), torch.float32, training=True)
    jobs = jobs_of(steps, {"late": "lpt(5)@1", "early": "lpt(3)", "lora": "lora(r=4)"}, backbone.shape)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)

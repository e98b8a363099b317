"""Jobs that train some entries of W or rotate its inputs: alone or in company the same bits, and only theirs change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.runtime.backbone import Backbone
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, jobs_of, pack_of, run

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = {
    "shira": "shira(r=2)",
    "lora": "lora(r=3)",
    "supra": "supertuning(sparsity=0.9, r=2, at=attn.*)",
    "oft": "oft(b=16)",
    "boft": "boft(b=4, m=3, at=attn.[qkv]|ffn.down)",
    "hra": "hra(r=4)",
    "road": "road(group=16)",
    "union": "oft(b=8, at=attn.q) + lora(r=2, at=attn.*) + ia3 + pafi(density=0.05, at=attn.q)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("texts", [TEXTS], ids=["all"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    texts: dict[str, str], steps: int, dtype: torch.dtype, folder: Path
) -> None:
    backbone = Backbone.load(folder, dtype, training=True)
    jobs = jobs_of(steps, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_the_entries_chosen_at_the_start_stay_the_same(folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    pack = pack_of(backbone, [a_job("shira", TEXTS["shira"], seed=1, steps=5)])
    slab = pack.jobs["shira"].slab
    before = {name: value.clone() for name, value in slab.frozen.items()}
    run(pack)
    assert before and all(torch.equal(slab.frozen[name], value) for name, value in before.items())
    assert all(value.count_nonzero() for value in slab.views.values())

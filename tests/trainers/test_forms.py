"""Methods whose operands a form makes: trained in company they end with the bits of training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.grafts.runtime.backbone import Backbone
from tests.tiny import tiny_llama
from tests.trainers.test_packed_equals_alone import assert_as_alone, jobs_of, pack_of, run

GENERATED = {
    "lokr": "lokr(r=2)",
    "loha": "loha(r=2, at=attn.v|ffn.down)",
    "krona": "krona(at=attn.v|ffn.down)",
    "kadaptation": "kadaptation(n=4, at=attn.[qv])",
    "hira": "hira(r=4, at=attn.v|ffn.down)",
    "glora": "glora(r=4, at=attn.v)",
    "hiwi": "hiwi(r=4)",
    "peanut": "peanut(r=4, depth=1, at=attn.v)",
    "randlora": "randlora(r=6, alpha=12, at=attn.v|ffn.down)",
    "fourierft": "fourierft(n=20)",
    "waveft": "waveft(n=20)",
    "c3a": "c3a(block=16, at=attn.v|ffn.down)",
    "bat": "bat(r=8, at=attn.v)",
    "peqa": "peqa(at=attn.v|ffn.down)",
    "qalora": "qalora(r=4, group=8, at=attn.v|ffn.down)",
    "said": "said(d=20, at=attn.v|ffn.down)",
}
FACTORED = {
    "vera": "vera(r=8)",
    "vblora": "vblora(r=3, vectors=10, length=16)",
    "unilora": "unilora(r=3, d=24)",
    "miss": "miss(r=6)",
    "gralora": "gralora(r=4, k=2)",
    "bdlora": "bdlora(r=4, blocks=2)",
    "deft": "deft(r=4, at=attn.v|ffn.down)",
    "para": "para(r=2, at=attn.v)",
    "psoft": "psoft(r=4)",
    "delora": "delora(r=4, bound=1)",
    "tinylora": "tinylora(r=2, u=3, tied=1)",
    "compacter": "compacter(8, n=4)",
    "hypernet-adapter": "hypernet-adapter(8, embedding=6, code=5)",
    "phm": "phm(8, n=2, at=ffn.out)",
    "sparse-adapter": "sparse-adapter(12, density=0.3)",
    "snip": "sparse-adapter(6, density=0.3, by=snip)",
    "propetl": "propetl(8)",
    "capaboost": "capaboost(r=4, d=2)",
    "binary-adapter": "binary-adapter(8)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [GENERATED, FACTORED], ids=["generated", "factored"])
@pytest.mark.equality("packed")
def test_steps_in_company_leave_the_bits_of_as_many_alone(
    steps: int, texts: dict[str, str], dtype: torch.dtype, one_thread: None, tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path), dtype, training=True)
    jobs = jobs_of(steps, {"lora": "lora(r=4)", **texts})
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)

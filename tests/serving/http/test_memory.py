"""A job that no pack could hold is refused when it is asked for, with the numbers, at the shape of Llama 7B: those of
its slab on torch's meta device, which has shapes and no memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polygraft.cluster.model import Limits, TenantId
from polygraft.cluster.policy.budget import state_bytes
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.catalogue import LLAMA_7B
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.slab import Slab
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.submission import new_job
from tests.serving.http.apis import knowing
from tests.serving.http.conftest import Service, upload
from tests.serving.http.test_jobs import body, supervised

pytestmark = pytest.mark.anyio
PACK = 64 << 30
# 32 layers of four matrices of 4096 x 4096 and three of 4096 x 11008 (Touvron et al. 2023, table 2).
WEIGHTS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)


@pytest.mark.parametrize(
    ("text", "trained", "kept"),
    [
        ("lt-sft", WEIGHTS, WEIGHTS),  # a change, and whether it stays
        ("diff-pruning", 2 * WEIGHTS, WEIGHTS + 7 * 32),  # a change and a gate; a mask, and a flag a matrix
        ("child-tuning", WEIGHTS, 2 * 7 * 32),  # two numbers a matrix to draw from
    ],
)
async def test_dense_methods_are_refused_at_7b_with_their_bytes(
    service: Service, text: str, trained: int, kept: int
) -> None:
    file = await upload(service.as_("ann"))
    api = replace(
        knowing(service.api, replace(service.backbone, shape=LLAMA_7B)), pack=lambda _: Limits(pack_bytes=PACK)
    )
    with pytest.raises(ApiError) as refusal:
        new_job(api, TenantId("ann"), body(file, method=supervised(peft=text)))
    said = str(refusal.value)
    assert refusal.value.status == 400
    assert f"'{text}' needs {16 * trained + 4 * kept:,} bytes in training, a pack has {PACK:,}" in said
    assert held(Slab(BoundGraft(parse(text), LLAMA_7B), device="meta")) == 16 * trained + 4 * kept
    assert f"{trained:,} trained numbers" in said and f"{kept:,} others" in said
    fewer = new_job(api, TenantId("ann"), body(file, method=supervised(peft=f"{text}(at=attn.q)@0-1"))).job
    assert fewer.parameters == trained * 2 * 4096**2 // WEIGHTS


@pytest.mark.parametrize("text", ["lt-sft", "diff-pruning", "child-tuning", "lora(r=4)", "shira(r=2)"])
async def test_the_estimate_is_what_a_jobs_slab_takes(text: str, service: Service) -> None:
    graft = BoundGraft(parse(text), service.backbone.shape)
    assert held(Slab(graft)) == state_bytes(graft.parameters, graft.frozen)


def held(slab: Slab) -> int:
    """Bytes of the slab's tensors, wherever they lie, once a gradient is collected."""
    device = slab.master.device
    slab.collect(slab.joined([torch.zeros(tensor.numel, device=device) for tensor in slab.trained]))
    assert slab.grad is not None
    tensors = (slab.master, slab.exp_avg, slab.exp_avg_sq, slab.grad, *slab.frozen.values())
    return sum(tensor.nbytes for tensor in tensors)

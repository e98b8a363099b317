"""Rotary embedding and the write to the paged cache: transformers' bits, in their places and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from polygraft.kernels.rotary import op, reference
from polygraft.kernels.rotary.op import HeadNorms, rotary_write
from tests.kernels.compare import relative

ROWS, HEADS, KV_HEADS, SLOTS = 9, 6, 2, 40
PLACES = torch.tensor([7, 0, 39, -1, 3, 4, 5, -1, 21])
WRITTEN = PLACES >= 0


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this machine computes it, and as one without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(op, "function", lambda *_: None)


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def projected(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a fused projection leaves them."""
    widths = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    q, k, v = normal(ROWS, sum(widths), seed=1, dtype=dtype).split_with_sizes(widths, dim=1)
    return q, k, v


def angles(count: int) -> Tensor:
    return torch.rand(ROWS, count, generator=torch.Generator().manual_seed(2)).double() * 6


def tables(angles_TN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    both = torch.cat((angles_TN, angles_TN), dim=1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [6, 32, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_keys_and_values_have_transformers_bits(dtype: torch.dtype, head_dim: int, normed: bool) -> None:
    q, k, v = projected(head_dim, dtype)
    cos, sin = tables(angles(head_dim // 2), dtype)
    heads = [torch.unflatten(x, 1, (-1, head_dim)) for x in (q, k)]
    norms = None
    if normed:
        norms = HeadNorms(*(1 + normal(head_dim, seed=s, dtype=dtype) / 4 for s in (3, 4)), 1e-6)  # type: ignore[arg-type,call-arg]
        for i, weight in enumerate((norms.q, norms.k)):
            module = Qwen3RMSNorm(head_dim, 1e-6)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            heads[i] = module(heads[i])
    wanted = [
        x[0].transpose(0, 1).flatten(1)
        for x in apply_rotary_pos_emb(*(h.transpose(0, 1)[None] for h in heads), cos[None], sin[None])
    ]
    cache = torch.full((SLOTS, 2, k.shape[1]), 7.0, dtype=dtype)
    before, values = cache.clone(), v.clone()
    rotary_write((q, k, v), (cos, sin), cache, PLACES, HEADS, norms)
    before[PLACES[WRITTEN], 0], before[PLACES[WRITTEN], 1] = wanted[1][WRITTEN], values[WRITTEN]
    if normed:  # the order of a norm's sum of squares is torch's own affair
        assert relative(q, wanted[0]) < 1e-3
        assert relative(cache, before) < 1e-3
    else:
        assert torch.equal(q, wanted[0])
        assert torch.equal(cache, before)


@pytest.mark.parametrize("turned", [8, 12])
def test_pairs_are_turned_in_their_plane_and_what_is_beyond_them_stays(turned: int) -> None:
    q, k, v = projected(12, torch.float32)
    own, keys = angles(turned // 2), torch.unflatten(k, 1, (-1, 12)).clone()
    queries = torch.unflatten(q, 1, (-1, 12)).clone()
    cache = torch.zeros(SLOTS, 2, k.shape[1])
    rotary_write((q, k, v), tables(own, torch.float32), cache, PLACES, HEADS)
    assert relative(q, reference.turned(queries.double(), own).flatten(1)) < 1e-6
    assert relative(cache[PLACES[WRITTEN], 0], reference.turned(keys.double(), own).flatten(1)[WRITTEN]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    q, k, v = projected(64, dtype)
    cos, sin = tables(angles(32), dtype)
    alone = q[4:5].clone(), k[4:5].clone(), v[4:5].clone()
    caches = [torch.zeros(SLOTS, 2, k.shape[1], dtype=dtype) for _ in range(2)]
    rotary_write((q, k, v), (cos, sin), caches[0], PLACES, HEADS)
    rotary_write(alone, (cos[4:5], sin[4:5]), caches[1], PLACES[4:5], HEADS)
    assert torch.equal(q[4:5], alone[0])
    assert torch.equal(caches[0][PLACES[4]], caches[1][PLACES[4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_turning_alone_has_transformers_bits_and_gradients(dtype: torch.dtype, head_dim: int) -> None:
    q, k, _ = (x.requires_grad_() for x in projected(head_dim, dtype))
    cos, sin = tables(angles(head_dim // 2), dtype)
    upstream = [normal(*x.shape, seed=s, dtype=dtype) for s, x in ((5, q), (6, k))]
    heads = [x.unflatten(1, (-1, head_dim)).transpose(0, 1)[None] for x in (q, k)]
    theirs = [x[0].transpose(0, 1).flatten(1) for x in apply_rotary_pos_emb(*heads, cos[None], sin[None])]
    wanted = torch.autograd.grad(theirs, (q, k), upstream)
    ours = op.turned(q, k, (cos, sin), HEADS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(ours, (q, k), upstream), wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_side_by_side_turn_as_apart_and_have_one_gradient(dtype: torch.dtype) -> None:
    parts = projected(64, dtype)
    upstream = [normal(*x.shape, seed=s, dtype=dtype) for s, x in enumerate(parts)]
    together, angle = torch.cat(parts, dim=1).requires_grad_(), tables(angles(32), dtype)
    q, k, v = (x.clone().requires_grad_() for x in parts)
    apart = *op.turned(q, k, angle, HEADS), v
    ours = op.turned_joined(together, [x.shape[1] for x in parts], angle, HEADS)
    assert all(torch.equal(a, b) for a, b in zip(ours, apart, strict=True))
    wanted = *torch.autograd.grad(apart[:2], (q, k), upstream[:2]), upstream[2]
    (found,) = torch.autograd.grad(ours, together, upstream)
    assert torch.equal(found, torch.cat(wanted, dim=1))


def test_turning_leaves_what_is_beyond_the_angles_and_passes_its_gradient_on() -> None:
    q, k, _ = (x.detach().requires_grad_() for x in projected(64, torch.float32))
    cos, sin = tables(angles(16), torch.float32)
    ours = op.turned(q, k, (cos, sin), HEADS)
    rest, before = (x.unflatten(1, (HEADS, 64))[..., 32:] for x in (ours[0], q))
    assert torch.equal(rest, before)
    (dq,) = torch.autograd.grad(rest.sum(), q)
    assert torch.equal(dq.unflatten(1, (HEADS, 64))[..., 32:], torch.ones(ROWS, HEADS, 32))

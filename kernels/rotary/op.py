"""The rotary op: rotary position embedding of queries and keys (Su et al. 2021, arXiv 2104.09864, eq. 34, in halves as
transformers has it), and keys and values put in their places of a paged cache, in one pass.

Each product and their sum is rounded to the inputs' dtype, as transformers rounds them; with a weight the queries and
keys of every head pass an RMS norm before (Qwen3). A row is one thread's, and a function of itself alone: neither other
rows nor the number of threads has a part in its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.compiled.calls import DTYPES, Call, Function, computes, function, structure
from polygraft.kernels.residual_norm.op import Norm, apply

_SOURCE = Path(__file__).with_name("rotary.cpp")
_TURNED = structure(
    "Turned",
    pointers="q k cos sin q_to k_to",
    integers="q_stride k_stride q_to_stride k_to_stride rows heads kv_heads head_dim turned dtype back threads",
)
_ROTARY = structure(
    "Rotary",
    pointers="q k v cos sin q_weight k_weight cache slots",
    integers="q_stride k_stride v_stride rows heads kv_heads head_dim turned dtype weight_dtype",
    numbers="eps",
    integers_="threads",
)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of every head's query and key, weights [head_dim] of one dtype."""

    q: Tensor
    k: Tensor
    eps: float


Rows = tuple[Tensor, Tensor, Tensor]  # q [T, heads * head_dim], k and v [T, kv_heads * head_dim]


def turned(q_TE: Tensor, k_TC: Tensor, angles: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Semantics: (turned(q[t]), turned(k[t])) as `rotary_write` has it; q [T, heads * head_dim], k [T, kv_heads *
    head_dim], whose rows may be a stride apart, cos and sin [T, turned], all of one dtype. Differentiable in q and
    k."""
    if _all_compiled(q_TE, k_TC, *angles) is not None:
        return _Turned.apply(q_TE, k_TC, *angles, heads)  # type: ignore[no-any-return,no-untyped-call]
    head_dim = q_TE.shape[1] // heads
    q, k = (_turned(torch.unflatten(x, 1, (-1, head_dim)), *angles).flatten(1) for x in (q_TE, k_TC))
    return q, k


def turned_joined(qkv_TE: Tensor, widths: Sequence[int], angles: tuple[Tensor, Tensor], heads: int) -> Rows:
    """Semantics: (turned(q[t]), turned(k[t]), v[t]) of rows of so many `widths` side by side; their gradient is one
    tensor, too."""
    if _all_compiled(qkv_TE, *angles) is not None:
        return _Joined.apply(qkv_TE, widths, *angles, heads)  # type: ignore[no-any-return,no-untyped-call]
    q, k, v = qkv_TE.split_with_sizes(widths, dim=1)
    return *turned(q, k, angles, heads), v


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads  # type: ignore[attr-defined]
        into = q.new_empty(q.shape), k.new_empty(k.shape)
        _turn(q, k, (cos, sin), heads, into, back=False)
        return into

    @staticmethod
    def backward(ctx: FunctionCtx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        into = dq.new_empty(dq.shape), dk.new_empty(dk.shape)
        _turn(dq, dk, ctx.saved_tensors, ctx.heads, into, back=True)  # type: ignore[attr-defined]
        return *into, None, None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, widths: Sequence[int], cos: Tensor, sin: Tensor, heads: int) -> Rows:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.widths = heads, widths  # type: ignore[attr-defined]
        q, k, v = qkv.split_with_sizes(widths, dim=1)
        into = q.new_empty(q.shape), k.new_empty(k.shape)
        _turn(q, k, (cos, sin), heads, into, back=False)
        return *into, v

    @staticmethod
    def backward(ctx: FunctionCtx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        widths = ctx.widths  # type: ignore[attr-defined]
        both = dq.new_empty(len(dq), sum(widths))
        q_to, k_to, v_to = both.split_with_sizes(widths, dim=1)
        _turn(dq, dk, ctx.saved_tensors, ctx.heads, (q_to, k_to), back=True)  # type: ignore[attr-defined]
        v_to.copy_(dv)
        return both, None, None, None, None


def _turn(
    q: Tensor, k: Tensor, angles: Sequence[Tensor], heads: int, into: tuple[Tensor, Tensor], *, back: bool
) -> None:
    q, k = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k))
    compiled = _all_compiled(q, k, *angles)
    assert compiled is not None
    cos, sin = (x.contiguous() for x in angles)
    q_to, k_to = into
    compiled.ready(
        **_rows_of(q, k, (cos, sin), heads),
        q_to=q_to,
        k_to=k_to,
        q_to_stride=q_to.stride(0),
        k_to_stride=k_to.stride(0),
        back=back,
    )()


def _all_compiled(*tensors: Tensor) -> Function | None:
    alike = len({x.dtype for x in tensors}) == 1 and all(x.stride(-1) == 1 for x in tensors)
    return function(_SOURCE, "turned", _TURNED) if alike and computes(*tensors) else None


def rotary_write(
    qkv: Rows, angles: tuple[Tensor, Tensor], cache: Tensor, slots_T: Tensor, heads: int, norms: HeadNorms | None = None
) -> None:
    """Semantics: q[t] = turned(q[t]) in place; cache[slots[t]] = (turned(k[t]), v[t]) where slots[t] >= 0; head by
    head, turned(x) = x cos[t] + (-x_high, x_low) sin[t], over the first len(cos[t]) numbers of a head.

    Rows of q, which has so many `heads`, of k and v may be a stride apart; angles cos and sin [T, turned]; cache
    [slots, 2, kv_heads * head_dim] contiguous, slots [T] int64. All of one dtype. Not differentiable.
    """
    call = ready(qkv, angles, cache, slots_T, heads, norms)
    if call is not None:
        return call()
    q, k, v = qkv
    head_dim = q.shape[1] // heads
    by_head = [torch.unflatten(x, 1, (-1, head_dim)) for x in (q, k)]
    if norms is not None:
        weights = norms.q, norms.k
        by_head = [apply(x, Norm(w, None, norms.eps, centred=False)) for x, w in zip(by_head, weights, strict=True)]
    turned = [_turned(x, *angles).flatten(1) for x in by_head]
    q.copy_(turned[0])
    written = slots_T >= 0
    cache.index_copy_(0, slots_T[written], torch.stack([turned[1], v], dim=1)[written])


def ready(
    qkv: Rows, angles: tuple[Tensor, Tensor], cache: Tensor, slots_T: Tensor, heads: int, norms: HeadNorms | None = None
) -> Call | None:
    """The call of `rotary_write` on these tensors as they will be then; None where it is not compiled."""
    (q, k, v), (cos, sin) = qkv, angles
    weights = () if norms is None else (norms.q, norms.k)
    compiled = _compiled((q, k, v, cos, sin, cache), weights)
    if compiled is None:
        return None
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cache.is_contiguous()
    assert slots_T.dtype == torch.int64
    return compiled.ready(
        **_rows_of(q, k, angles, heads),
        v=v,
        q_weight=None if norms is None else norms.q,
        k_weight=None if norms is None else norms.k,
        cache=cache,
        slots=slots_T,
        v_stride=v.stride(0),
        weight_dtype=DTYPES[(q, *weights)[-1].dtype],
        eps=0.0 if norms is None else norms.eps,
    )


def _rows_of(q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], heads: int) -> dict[str, Tensor | int]:
    """What both functions are told of queries, keys and angles."""
    head_dim = q.shape[1] // heads
    return {
        **dict(zip(("q", "k", "cos", "sin"), (q, k, *angles), strict=True)),
        "q_stride": q.stride(0),
        "k_stride": k.stride(0),
        "rows": len(q),
        "heads": heads,
        "kv_heads": k.shape[1] // head_dim,
        "head_dim": head_dim,
        "turned": angles[0].shape[1],
        "dtype": DTYPES[q.dtype],
        "threads": torch.get_num_threads(),
    }


def _compiled(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Function | None:
    alike = len({x.dtype for x in tensors}) == 1 and len({x.dtype for x in weights}) <= 1
    dense = all(x.stride(-1) == 1 for x in tensors)
    return function(_SOURCE, "rotary", _ROTARY) if alike and dense and computes(*tensors, *weights) else None


def _turned(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    width = cos_TD.shape[1]
    x, rest = x_THD[..., :width], x_THD[..., width:]
    half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    y = x * cos_TD.unsqueeze(1) + half * sin_TD.unsqueeze(1)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y

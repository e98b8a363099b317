"""The swiglu op: silu(gate) * up (SwiGLU; Shazeer 2020, arXiv 2002.05202, eq. 6) over the two halves of one product,
in one pass forward and one backward.

silu is rounded to the inputs' dtype before the product, as transformers does. Every number of the result is a function
of the two at its place, computed alike wherever it lies, so that neither other rows nor the number of threads has a
part in its bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from polygraft.kernels.compiled.calls import DTYPES, Call, Function, computes, function, structure

_SOURCE = Path(__file__).with_name("swiglu.cpp")
_FORWARD = structure("Forward", pointers="gate up out", integers="rows width gate_stride up_stride dtype threads")
_BACKWARD = structure(
    "Backward",
    pointers="grad gate up d_gate d_up",
    integers="rows width grad_stride gate_stride up_stride d_stride dtype threads",
)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Semantics: out = silu(gate) * up, [.., F] contiguous; differentiable in both, which alone are kept."""
    if torch.is_grad_enabled() and (gate_TF.requires_grad or up_TF.requires_grad):
        return _SwiGLU.apply(gate_TF, up_TF)  # type: ignore[no-any-return,no-untyped-call]
    return product(gate_TF, up_TF)


def swiglu_joined(both_TF: Tensor) -> Tensor:
    """Semantics: swiglu of the two halves of every row, [.., 2 F]; its gradient is one tensor, too."""
    if torch.is_grad_enabled() and both_TF.requires_grad:
        return _Joined.apply(both_TF)  # type: ignore[no-any-return,no-untyped-call]
    return product(*both_TF.chunk(2, dim=-1))


def product(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The same, not differentiable."""
    compiled = _compiled("swiglu", _FORWARD, gate_TF, up_TF)
    if compiled is None:
        return F.silu(gate_TF).mul_(up_TF)
    out = gate_TF.new_empty(gate_TF.shape)
    _forward(compiled, _flat(gate_TF), _flat(up_TF), out)()
    return out


def ready(gate_TF: Tensor, up_TF: Tensor, out_TF: Tensor) -> Call | None:
    """The call that writes the op to `out`, contiguous, from rows of any stride; None where it is not compiled."""
    compiled = _compiled("swiglu", _FORWARD, gate_TF, up_TF)
    return None if compiled is None else _forward(compiled, gate_TF, up_TF, out_TF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return product(gate, up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        d_gate, d_up = _gradient(grad, *ctx.saved_tensors).chunk(2, dim=-1)  # type: ignore[attr-defined]
        return d_gate, d_up


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return product(*both.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _gradient(grad, *both.chunk(2, dim=-1))


def _gradient(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Of gate and up side by side, [.., 2 F]."""
    both = grad.new_empty(*grad.shape[:-1], 2 * grad.shape[-1])
    d_gate, d_up = both.chunk(2, dim=-1)
    compiled = _compiled("swiglu_backward", _BACKWARD, gate, up, grad)
    if compiled is None:
        torch.mul(F.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return both
    rows = [_flat(x) for x in (grad, gate, up, d_gate, d_up)]
    compiled.ready(
        **dict(zip(("grad", "gate", "up", "d_gate", "d_up"), rows, strict=True)),
        rows=len(rows[0]),
        width=grad.shape[-1],
        grad_stride=rows[0].stride(0),
        gate_stride=rows[1].stride(0),
        up_stride=rows[2].stride(0),
        d_stride=rows[3].stride(0),
        dtype=DTYPES[grad.dtype],
        threads=torch.get_num_threads(),
    )()
    return both


def _forward(compiled: Function, gate: Tensor, up: Tensor, out: Tensor) -> Call:
    return compiled.ready(
        gate=gate,
        up=up,
        out=out,
        rows=len(gate),
        width=gate.shape[-1],
        gate_stride=gate.stride(0),
        up_stride=up.stride(0),
        dtype=DTYPES[gate.dtype],
        threads=torch.get_num_threads(),
    )


def _compiled(name: str, arguments: type, *tensors: Tensor) -> Function | None:
    same = len({x.dtype for x in tensors}) == 1 and computes(*tensors)
    return function(_SOURCE, name, arguments) if same else None


def _flat(x: Tensor) -> Tensor:
    """[rows, F] whose rows are a stride apart: a view, where it can be."""
    rows = x.reshape(-1, x.shape[-1]) if x.is_contiguous() or x.dim() != 3 or len(x) != 1 else x[0]
    return rows if rows.stride(1) == 1 else rows.contiguous()

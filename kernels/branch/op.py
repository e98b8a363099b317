"""The branch op: y[s] += scale_s * act(x[s] A_s^T + a_s) B_s over segments s of mixed rank (SGMV; Punica, Chen et al.
2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch import activation, cost
from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segments


def branch(  # noqa: PLR0913
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str = "identity",
    a_R1: Tensor | None = None,
) -> Tensor:
    """Semantics: out = y; out[s.start:s.stop] += s.scale * act(x[s.start:s.stop] @ A[s.first:s.last]^T +
    a[s.first:s.last]^T) @ B[s.first:s.last].

    x [T, in], y [T, out], A [R, in] and B [R, out] of one dtype, R the ranks of all grafts in the stack, never padded;
    a [R, 1] or None, the hidden biases.
    Segments may overlap. Differentiable in x, y, A, B and a; the sums over rows of dA, dB and da stay inside a
    segment, so they do not depend on other segments (row invariance, docs/architecture.md). Where neither A nor B can
    collect a gradient the op may multiply rows by foreign ranks and select the products out before B; the caller
    vouches that the stack is finite.
    """
    if not segments.runs:
        return y_TO
    if x_TI.is_cuda:
        from polygraft.kernels.branch import gpu  # Triton is loaded only where there is a GPU

        return gpu.branch(x_TI, y_TO, A_RI, B_RO, segments, act, a_R1)
    if torch.is_grad_enabled() and (
        x_TI.requires_grad or y_TO.requires_grad or A_RI.requires_grad or B_RO.requires_grad
    ):
        return _Branch.apply(x_TI, y_TO, A_RI, B_RO, a_R1, segments, act)  # type: ignore[no-any-return,no-untyped-call]
    if A_RI.requires_grad or B_RO.requires_grad:  # evaluation in training: as in a step
        return _segmented(x_TI, y_TO, A_RI, B_RO, a_R1, segments, act)[0]
    out = y_TO.clone()
    serve_branch_(out, x_TI, A_RI, B_RO, segments, act, a_R1)
    return out


def serve_branch_(  # noqa: PLR0913
    y_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str,
    a_R1: Tensor | None = None,
) -> None:
    """The branch added to y in place where no gradient will be asked for; y may be columns of a wider tensor.

    In the cheaper of two forms: products of the whole stack with foreign columns selected out, or batched ones, a run
    at a time. Unlike `add_branch_` it leaves the order of long sums to the library, which may choose it by the batch.
    """
    runs = ((run.count, run.rows, run.size) for run in segments.runs)
    if cost.stacking_pays(len(x_TI), len(A_RI), runs, A_RI.shape[1], B_RO.shape[1]):
        factor, foreign = segments.scales_TR(len(x_TI), len(A_RI), x_TI)
        hidden = activation.ACTIVATIONS[act](x_TI @ A_RI.T if a_R1 is None else x_TI @ A_RI.T + a_R1.T)
        y_TO.addmm_((hidden * factor).masked_fill_(foreign, 0).to(y_TO.dtype), B_RO)
        return
    for run in segments.runs:
        hidden = torch.bmm(run.batch(x_TI), run.stack(A_RI).transpose(1, 2))
        if a_R1 is not None:
            hidden += run.stack(a_R1).transpose(1, 2)
        up = activation.ACTIVATIONS[act](hidden)
        if len(set(run.scales)) == 1:
            run.batch(y_TO).baddbmm_(up, run.stack(B_RO), alpha=run.scales[0])
        else:
            run.batch(y_TO).baddbmm_(run.scaled(up), run.stack(B_RO))


def _segmented(  # noqa: PLR0913
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, a: Tensor | None, segments: Segments, act: str
) -> tuple[Tensor, list[Tensor]]:
    out = y.clone()
    return out, add_branch_(out, x, A, B, segments, act, a)


def add_branch_(  # noqa: PLR0913
    y_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str,
    a_R1: Tensor | None = None,
) -> list[Tensor]:
    """The branch added to y in place, outside autograd; y may be columns of a wider tensor.

    Returns what `branch_gradients` needs: the activation's input of every run, [count, rows, rank].
    """
    hiddens = []
    for run in segments.runs:
        hidden = segment_bmm(run.batch(x_TI), run.stack(A_RI).transpose(1, 2))
        if a_R1 is not None:
            hidden += run.stack(a_R1).transpose(1, 2)
        hiddens.append(hidden)
        up = run.scaled(activation.forward(act, hidden))
        add_segment_bmm_(run.batch(y_TO), up, run.stack(B_RO))
    return hiddens


def branch_gradients(  # noqa: PLR0913
    grad_TO: Tensor,
    x_TI: Tensor | None,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str,
    hiddens: Sequence[Tensor],
    dx_TI: Tensor | None,
    da_R1: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dB) for the gradient of y + branch, None for one that asks for none: dA alone reads x, which may be None
    then. The branch's shares of the gradients of x and of the hidden biases are added to dx and da in place."""
    make = torch.empty_like if segments.covers(len(A_RI)) else torch.zeros_like
    dA = make(A_RI) if A_RI.requires_grad else None
    dB = make(B_RO) if B_RO.requires_grad else None
    for run, hidden in zip(segments.runs, hiddens, strict=True):
        dy = run.batch(grad_TO)
        up = run.scaled(activation.forward(act, hidden))
        dh = activation.backward(act, run.scaled(segment_bmm(dy, run.stack(B_RO).transpose(1, 2))), hidden)
        for whole, left, read in ((dB, up, grad_TO), (dA, dh, x_TI)):
            if whole is None:
                continue
            assert read is not None
            into, right = run.stack(whole), run.batch(read)
            if make is torch.empty_like:
                segment_bmm(left.transpose(1, 2), right, out=into)
            else:
                into.add_(segment_bmm(left.transpose(1, 2), right))
        if da_R1 is not None:
            for own, slope in zip(run.stack(da_R1), dh, strict=True):  # a sum over a segment's rows has its shape alone
                own.add_(slope.sum(0).unsqueeze(1))
        if dx_TI is not None:
            add_segment_bmm_(run.batch(dx_TI), dh, run.stack(A_RI))
    return dA, dB


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx, x: Tensor, y: Tensor, A: Tensor, B: Tensor, a: Tensor | None, segments: Segments, act: str
    ) -> Tensor:
        out, hiddens = _segmented(x, y, A, B, a, segments, act)
        ctx.save_for_backward(x if A.requires_grad else None, A, B, *hiddens)  # type: ignore[arg-type]  # None is allowed
        ctx.segments, ctx.act, ctx.biased = segments, act, a is not None  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, *hiddens = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad = grad.contiguous()
        dx = grad.new_zeros(len(grad), A.shape[1]) if needs[0] else None
        da = A.new_zeros(len(A), 1) if ctx.biased else None  # type: ignore[attr-defined]
        dA, dB = branch_gradients(grad, x, A, B, ctx.segments, ctx.act, hiddens, dx, da)  # type: ignore[attr-defined]
        return dx, grad if needs[1] else None, dA, dB, da, None, None

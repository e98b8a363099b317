"""The norms of the rows of W + dW, which DoRA's magnitudes are over (Liu et al. 2024, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping

from polygraft.grafts.runtime.keys import NormKey, OpKey, Phase
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.padding import padded
from polygraft.grafts.runtime.stack import Stack
from polygraft.kernels.norm.op import row_norm


def rescale(at_site: Mapping[OpKey, Stack], linear: FrozenLinear, member: int, graft: int) -> None:
    """Compute the norms of a graft at a site again, after its branch there changed; `at_site` are the site's stacks."""
    norm = at_site[NormKey()]
    low = sum(linear.widths[:member])
    high = low + linear.widths[member]
    branches = [
        (stack, own)
        for key, stack in at_site.items()
        if key.phase in (Phase.BRANCH_OF_INPUT, Phase.BRANCH_OF_OUTPUT)
        for own in stack.slices
        if own.graft == graft
    ]
    if len(branches) != 1:
        raise AssertionError(f"DoRA's norm is over one branch of its graft, found {len(branches)}")
    stack, own = branches[0]
    A, B = (stack.parts[part].detach()[own.first : own.last] for part in "AB")
    rows = A.new_zeros(padded(len(A)), A.shape[1])
    rows[: len(A)] = A
    AW = linear.product_alone(rows)[: len(A), low:high]
    total = row_norm(linear.row_sq[low:high], AW, A, B, own.scale)
    index = next(one.first for one in norm.slices if one.graft == graft)
    norm.parts["norm"][index] = total.to(norm.parts["norm"].dtype)

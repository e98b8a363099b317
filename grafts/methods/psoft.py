"""PSOFT: the r largest singular directions of W are turned among themselves, y += U S (R - I) V^T x with R = diag(b)
(I + Q) (I - Q)^-1 diag(a), Q skew-symmetric; only Q, a and b are trained (OpenReview FSHrinMArK, as in PEFT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Form, Lowering, Method, Part, Place
from polygraft.grafts.methods.spectral import on_projections
from polygraft.grafts.spec import Branch, Call, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def psoft(r: int = 32, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    if r < 2:
        raise SpecError(f"peft: psoft.r: {r} directions cannot be turned; give at least 2")
    return (Branch(at=on_projections(at), rank=r, dropout=dropout, form=Call("psoft")),)


def _own(slot: Branch, place: Place) -> Mapping[str, Part]:
    r = slot.rank
    return {
        "A": Part((r, place.d_in), "truncated", trained=False),
        "B": Part((r, place.d_out), "truncated", trained=False),
        "q": Part((r * (r - 1) // 2,)),
        "before": Part((r,), "one"),
        "after": Part((r,), "one"),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    import torch

    q, r = values["q"], slot.rank
    eye = torch.eye(r, dtype=q.dtype, device=q.device)
    rows, columns = torch.triu_indices(r, r, 1, device=q.device)
    upper = torch.zeros_like(eye).index_put((rows, columns), q)
    Q = upper - upper.T
    R = values["after"].unsqueeze(1) * torch.linalg.solve(eye - Q, eye + Q, left=False) * values["before"]
    return {"A": (R - eye) @ values["A"], "B": values["B"]}


METHODS = (Method("psoft", "OpenReview FSHrinMArK", 1e-4, psoft),)
FORMS = (Form("psoft", _operands, _own),)

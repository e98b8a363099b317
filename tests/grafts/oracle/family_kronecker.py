"""dW of Kronecker products, and dW made from W."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import HiraConfig, LoKrConfig, PeanutConfig, PeftModel
from torch import Tensor
from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, Parts, after
from polygraft.launch.demo.oracle.plain import Place, split
from tests.grafts.oracle.equations import dense
from tests.grafts.oracle.peft_places import layer_of, parts
from tests.grafts.oracle.row import LINEAR, Row

_LOKR = parts(
    {"C": "lokr_w1", "C1": "lokr_w1_a", "C2": "lokr_w1_b", "BA": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}
)


def krona(scale: float) -> Hook:
    """y = W x + s (A (x) B) x with (A (x) B) x = vec(A X B^T), X the rows of x in A's columns (Edalati et al. 2022, eq.
    3 and 5), written for row-major matrices."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        X = x.view(*x.shape[:-1], p["A"].shape[1], p["B"].shape[1])
        return y + scale * (p["A"] @ X @ p["B"].T).flatten(-2)

    return after(equation)


def kadaptation() -> Hook:
    """dW = sum_i S_i (x) (u_i v_i^T), element by element of the blocks (He et al. 2022)."""

    def change(W: Tensor, p: Parts) -> Tensor:
        S, u, v = p["S"], p["s"], p["t"]
        rows = []
        for a in range(S.shape[1]):
            blocks = [sum(S[i, a, b] * u[i].outer(v[i]) for i in range(len(S))) for b in range(S.shape[2])]
            rows.append(torch.cat(blocks, 1))  # type: ignore[arg-type]
        return torch.cat(rows)

    return dense(change)


def hiwi(scale: float) -> Hook:
    """W <- W + s relu(W A) B: an adapter whose input are the pre-trained weights (Liao et al. 2023, section 3.2)."""

    def change(W: Tensor, p: Parts) -> Tensor:
        return torch.stack([scale * F.relu(p["A"] @ row) @ p["B"] for row in W])

    return dense(change)


def _peanut(model: PeftModel, name: str, value: Tensor) -> Place:
    part = split(name)[3]
    layer = layer_of(model, name)
    if part in "AB":
        return Place(getattr(layer, f"peanut_{part}")["default"].weight)
    kind, index = part[:-1], int(part[-1])
    return Place(getattr(layer, f"peanut_{kind}s")["default"][index].weight)


ROWS: Mapping[str, Row] = {
    "lokr": Row("lokr(r=2, alpha=3)", lambda: LoKrConfig(r=2, alpha=3, target_modules=LINEAR), place=_LOKR),
    "lokr with a wished factor": Row(
        "lokr(r=2, alpha=3, factor=8, both=1)",
        lambda: LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=LINEAR),
        place=_LOKR,
    ),
    "krona": Row("krona(scale=2)", hooks=lambda: {0: krona(2.0)}),
    "kadaptation": Row("kadaptation(n=4, at=attn.[qv]|ffn.down)", hooks=lambda: {0: kadaptation()}),
    "hira": Row(
        "hira(r=4)",
        lambda: HiraConfig(r=4, target_modules=LINEAR),
        place=parts({"A": "hira_A", "B": "hira_B"}),
    ),
    "hiwi": Row("hiwi(r=4, scale=2)", hooks=lambda: {0: hiwi(2.0)}),
    "peanut": Row(
        "peanut(r=4, depth=2, scale=2)",
        lambda: PeanutConfig(r=4, depth=2, scaling=2.0, target_modules=LINEAR),
        place=_peanut,
    ),
}

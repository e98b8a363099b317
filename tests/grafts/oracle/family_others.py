"""Methods over grafts that were trained before, as naive models of their papers' equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, Parts, after
from tests.grafts.oracle.family_mixes import molora
from tests.grafts.oracle.row import Row, Values


def output_gated(count: int) -> Hook:
    """sum_i G_i E_i(x) with G = softmax(e (E_1(x) + ... + E_N(x))), + of vectors end to end (Wu et al. 2024, section
    3.2), without normalisation and for each row."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        outputs = [x @ A.T @ B for A, B in zip(p["A"].chunk(count), p["B"].chunk(count), strict=True)]
        weights = torch.softmax(torch.cat(outputs, -1) @ p["e"].T, dim=-1)
        for i, output in enumerate(outputs):
            y = y + weights[..., i : i + 1] * output
        return y

    return after(equation)


def o_lora(scale: float) -> Hook:
    """W x + sum_i B_i A_i x + s B A x (Wang et al. 2023, section 3)."""
    return after(lambda x, y, p: y + x @ p["A0"].T @ p["B0"] + scale * (x @ p["A"].T @ p["B"]))


def fusion(count: int) -> Hook:
    """h + sum_n softmax_n(h^T Q (z_n^T K)^T) z_n^T V over the adapters' outputs z_n (Pfeiffer et al. 2021, section
    3.2)."""

    def equation(x: Tensor, h: Tensor, p: Parts) -> Tensor:
        z = torch.stack(
            [F.gelu(h @ A.T) @ B for A, B in zip(p["A"].chunk(count), p["B"].chunk(count), strict=True)], dim=-2
        )
        weights = torch.softmax(((h @ p["Q"]).unsqueeze(-2) * (z @ p["K"])).sum(-1), dim=-1)
        return h + (weights.unsqueeze(-1) * (z @ p["V"])).sum(-2)

    return after(equation)


def prompt(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """[P; E(x)] (Lester et al. 2021, section 2)."""
    return torch.cat([p["0.0.embed.p"], x])


def subspace(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """P from the coordinates z of a subspace (Qin et al. 2021, section 3), a linear one."""
    D, m, z = (p[f"0.0.embed.{part}"] for part in "Dmz")
    return torch.cat([m + torch.einsum("d,dnw->nw", z, D), x])


ROWS: Mapping[str, Row] = {
    "meteora": Row(
        "meteora(r=3, at=attn.[qv]|ffn.down, top=2, of=a|b|c)",
        hooks=lambda: {0: molora(3, 1.0, top=2)},
        members="lora(r=2, alpha=4, at=attn.[qv]) + rslora(r=3, at=ffn.down)",
    ),
    "output-gated-loras": Row(
        "output-gated-loras(r=2, of=a|b|c)", hooks=lambda: {0: output_gated(3)}, members="lora(r=2, alpha=4)"
    ),
    "o-lora": Row("o-lora(r=4, alpha=6, old=3, of=a|b@7)", hooks=lambda: {0: o_lora(1.5)}, members="mica(r=3)"),
    "fusion": Row("fusion(6, of=a|b|c)", hooks=lambda: {0: fusion(3)}, members="serial(5, at=ffn.out)@1"),
    "spot": Row("spot(5, of=a|b)", soft=prompt, members="prompt(5, start=normal)"),
    "ipt": Row("ipt(5, d=2, of=a|b|c)", soft=subspace, members="dpt(5, r=2)"),
    "from": Row("prompt(4) + from(of=a)", soft=prompt, members="prompt(4)"),
}

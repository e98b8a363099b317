"""Mixtures of experts and gated branches, as naive models of their papers' equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.launch.demo.oracle.naive import Hook, Parts, after, parallel
from tests.grafts.oracle.row import Row


def molora(experts: int, scale: float, top: int = 0) -> Hook:
    """y = W x + sum_i s_i E_i(x), s = softmax(W_g x) (Zadouri et al. 2023), E_i = scale B_i A_i; with `top`,
    S_j = TopK(softmax(W_r x), K)_j / sum of the K (Gao et al. 2024)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        weights = torch.softmax(x @ p["G"].T, dim=-1)
        if top:
            worst = weights.topk(top, dim=-1).values.min(-1, keepdim=True).values
            weights = torch.where(weights >= worst, weights, 0)
            weights = weights / weights.sum(-1, keepdim=True)
        for i, (A, B) in enumerate(zip(p["A"].chunk(experts), p["B"].chunk(experts), strict=True)):
            y = y + scale * weights[..., i : i + 1] * (x @ A.T @ B)
        return y

    return after(equation)


def hydralora(experts: int, scale: float) -> Hook:
    """W = W_0 + sum_i w_i B_i A, w = softmax(W_g x) (Tian et al. 2024)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        weights, shared = torch.softmax(x @ p["G"].T, dim=-1), x @ p["A"].T
        for i, B in enumerate(p["B"].chunk(experts)):
            y = y + scale * weights[..., i : i + 1] * (shared @ B)
        return y

    return after(equation)


def job_gated(experts: int, scale: float) -> Hook:
    """h = W_0 x + alpha / r sum_i w_i B_i A_i x (Liu et al. 2023), w = softmax(W_T e)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        weights = torch.softmax(p["T"] @ p["e"], dim=0)
        for i, (A, B) in enumerate(zip(p["A"].chunk(experts), p["B"].chunk(experts), strict=True)):
            y = y + scale * weights[i] * (x @ A.T @ B)
        return y

    return after(equation)


def gated_lora() -> Hook:
    """W x + G_L B A x with G_L = sigmoid(W_G x) in place of LoRA's scale (Mao et al. 2022, section 3)."""
    return after(lambda x, y, p: y + torch.sigmoid(x @ p["G"].T) * (x @ p["A"].T @ p["B"]))


def gated_adapter() -> Hook:
    """h' = G_A h_A + h_F with G_A = sigmoid(W_G h_F), h_A the adapter's output (Mao et al. 2022, section 3)."""
    return after(lambda x, y, p: y + torch.sigmoid(y @ p["G"].T) * (torch.relu(y @ p["A"].T) @ p["B"]))


def feed_forward_adapter() -> Hook:
    """h + W_up relu(W_down h) on the feed-forward's own output (Zhou et al. 2024, section 3.1)."""
    return after(lambda x, y, p: y + torch.relu(y @ p["A"].T) @ p["B"])


ROWS: Mapping[str, Row] = {
    "molora": Row("molora(r=2, experts=3, alpha=4)", hooks=lambda: {0: molora(3, 2.0)}),
    "molora top 2": Row(
        "molora(r=2, experts=4, alpha=4, at=attn.q|ffn.down, top=2)", hooks=lambda: {0: molora(4, 2.0, top=2)}
    ),
    "hydralora": Row("hydralora(r=3, experts=2, alpha=6, at=attn.[qv]|ffn.down)", hooks=lambda: {0: hydralora(2, 2.0)}),
    "unipelt-al": Row("unipelt-al(r=4, size=6)", hooks=lambda: {0: gated_lora(), 1: gated_adapter()}),
    "autopeft": Row(
        "autopeft(serial=4, parallel=6, prefix=3)", hooks=lambda: {0: feed_forward_adapter(), 1: parallel(4.0)}
    ),
    "job-gated-experts": Row(
        "job-gated-experts(r=8, experts=4, alpha=4, task=3)", hooks=lambda: {0: job_gated(4, 0.5)}
    ),
}

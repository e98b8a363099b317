"""Adapters and dW of far fewer numbers: shared, masked, of few bits, or one random projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, Parts, after
from tests.grafts.oracle.equations import dense
from tests.grafts.oracle.row import Row


def compacter() -> Hook:
    """h + up(gelu(down(h))) with W = sum_i A_i (x) (s_i t_i^T) (Karimi Mahabadi et al. 2021, section 3)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        down = sum(torch.kron(S, torch.outer(s, t)) for S, s, t in zip(p["S"], p["down_s"], p["down_t"], strict=True))
        up = sum(torch.kron(S, torch.outer(s, t)) for S, s, t in zip(p["S"], p["up_s"], p["up_t"], strict=True))
        return y + F.linear(F.gelu(F.linear(y, down)), up)  # type: ignore[arg-type]

    return after(equation)


def phm() -> Hook:
    """h + up(gelu(down(h))) with W = sum_i A_i (x) B_i (Karimi Mahabadi et al. 2021, section 3)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        down = sum(torch.kron(S, T) for S, T in zip(p["S"], p["down"], strict=True))
        up = sum(torch.kron(S, T) for S, T in zip(p["S"], p["up"], strict=True))
        return y + F.linear(F.gelu(F.linear(y, down)), up)  # type: ignore[arg-type]

    return after(equation)


def hypernet() -> Hook:
    """(U, D) = (W^U, W^D) I with I = h(z), h two linear maps with a ReLU between, and U gelu(D(.)) after the sublayer
    (Karimi Mahabadi et al. 2021, section 2, one task)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        code = F.linear(F.relu(F.linear(p["e"], p["first"])), p["second"])
        down, up = (F.linear(code, p[side]).view(-1, y.shape[-1]) for side in ("down", "up"))
        return y + F.gelu(y @ down.T) @ up

    return after(equation)


def sparse_adapter() -> Hook:
    """A serial adapter with (m * w) in place of w (He et al. 2022)."""
    return after(lambda x, y, p: y + F.gelu(y @ (p["mask_A"] * p["A"]).T) @ (p["mask_B"] * p["B"]))


class _Threshold(torch.autograd.Function):
    """1 for the k largest scores, 0 for the others, and the identity backwards (Zeng et al. 2023)."""

    @staticmethod
    def forward(ctx: object, score: Tensor, density: float) -> Tensor:
        order = score.flatten().argsort(descending=True)
        mask = torch.zeros(score.numel(), dtype=score.dtype)
        mask[order[: round(density * score.numel())]] = 1
        return mask.view(score.shape)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def propetl(density: float) -> Hook:
    """A serial adapter whose weights are the prototype's under the site's masks (Zeng et al. 2023)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        masks = {part: _Threshold.apply(p[f"score_{part}"], density) for part in "AB"}
        return y + F.gelu(y @ (p["A"] * masks["A"]).T) @ (p["B"] * masks["B"])

    return after(equation)


def capaboost(scale: float) -> Hook:
    """h + s sum_i (B * M_i) (A * M'_i) x (Song et al. 2024)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        for mask_A, mask_B in zip(p["mask_A"], p["mask_B"], strict=True):
            y = y + scale * (x @ (p["A"] * mask_A).T) @ (p["B"] * mask_B)
        return y

    return after(equation)


def peqa(bits: int, groups: int) -> Hook:
    """W^ = s (clamp(round(W / s0) + z0, 0, 2^b - 1) - z0), s trained (Kim et al. 2023, section 3), group by group."""

    def change(W: Tensor, p: Parts) -> Tensor:
        found = []
        for row, scales in zip(W, p["s"], strict=True):
            for values, s in zip(row.chunk(groups), scales, strict=True):
                low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
                s0 = torch.tensor((high - low) / (2**bits - 1), dtype=W.dtype)
                z0 = -torch.round(torch.tensor(low, dtype=W.dtype) / s0)
                found.append(s * (torch.clamp(torch.round(values / s0) + z0, 0, 2**bits - 1) - z0))
        return torch.cat(found).view(W.shape) - W

    return dense(change)


def bitdelta() -> Hook:
    """W + a S with S of +1 and -1 (Liu et al. 2024); a number's lowest bit is the sign of its first element."""

    def change(W: Tensor, p: Parts) -> Tensor:
        rows = []
        for row in p["signs"].tolist():
            bits = "".join(f"{int(number):024b}"[::-1] for number in row)
            rows.append([1.0 if bit == "1" else -1.0 for bit in bits[: W.shape[1]]])
        return p["a"] * torch.tensor(rows, dtype=W.dtype)

    return dense(change)


def _words(values: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(0, 2**24, value.shape, generator=generator).double() if name.endswith(".signs") else value
        for name, value in values.items()
    }


class _Round(torch.autograd.Function):
    """The medians of the halves of a standard normal distribution, and the identity backwards (Jie et al. 2023, eq.
    5-7 for one bit)."""

    @staticmethod
    def forward(ctx: object, z: Tensor) -> Tensor:
        median = NormalDist().inv_cdf(0.75)
        return torch.where(z > 0, torch.full_like(z, median), torch.full_like(z, -median))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def binary_adapter(scale: float) -> Hook:
    """h + s gelu(x A) B with each weight standardised, rounded to one bit and scaled back (Jie et al. 2023, section 3;
    the 1e-5 beside the deviation is their code's)."""

    def rounded(w: Tensor) -> Tensor:
        mean = w.sum() / w.numel()
        deviation = ((w - mean).square().sum() / (w.numel() - 1)).sqrt()
        found: Tensor = _Round.apply((w - mean) / (deviation + 1e-5))
        return found * deviation + mean

    return after(lambda x, y, p: y + scale * F.gelu(x @ rounded(p["A"]).T) @ rounded(p["B"]))


def said(d: int, seed: int, sites: Sequence[str]) -> Hook:
    """vec(dW) = l P z with P of stacked H G Pi H B, rows of length 1 (Aghajanyan et al. 2021, section 3; Le et al.
    2013), by dense matrices. The draws of the sites, in their order, are those that the method's file promises."""
    width = 1 << (d - 1).bit_length()
    H, names = hadamard(width), iter(sites)

    def hook(module: nn.Module, parts: Parts) -> None:
        W = module.get_parameter("weight")
        blocks = -(-W.numel() // width)
        generator = torch.Generator().manual_seed(crc32(f"{seed}/{next(names)}".encode()))
        signs = torch.randint(0, 2, (blocks, width), generator=generator).double() * 2 - 1
        orders = torch.rand(blocks, width, generator=generator).argsort(1)
        normals = torch.randn(blocks, width, generator=generator).double()
        made = []
        for B, order, G in zip(signs, orders, normals, strict=True):
            P = H @ G.diag() @ torch.eye(width, dtype=torch.float64)[order] @ H @ B.diag()
            made.append(P / P.square().sum(1, keepdim=True).sqrt())
        P = torch.cat(made)[: W.numel(), :d].to(W.dtype)
        after(lambda x, y, p: y + x @ (p["l"] * (P @ p["z"])).view(W.shape).T)(module, parts)

    return hook


def hadamard(width: int) -> Tensor:
    """Sylvester's construction: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < width:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


SITES = ("attn.q", "attn.v", "ffn.down")
ROWS: Mapping[str, Row] = {
    "compacter": Row("compacter(8, n=4)", hooks=lambda: {0: compacter()}),
    "compacter++": Row("compacter(8, n=2, at=ffn.out)", hooks=lambda: {0: compacter()}),
    "phm": Row("phm(8, n=4)", hooks=lambda: {0: phm()}),
    "sparse-adapter": Row("sparse-adapter(12, density=0.3)", hooks=lambda: {0: sparse_adapter()}),
    "propetl": Row("propetl(8, density=0.4)", hooks=lambda: {0: propetl(0.4)}),
    "capaboost": Row("capaboost(r=4, alpha=8, d=3)", hooks=lambda: {0: capaboost(2.0)}),
    "peqa": Row("peqa", hooks=lambda: {0: peqa(4, 1)}),
    "peqa in groups": Row("peqa(bits=3, group=16, at=attn.*)", hooks=lambda: {0: peqa(3, 4)}),
    "bitdelta": Row("bitdelta(of=tuned)", hooks=lambda: {0: bitdelta()}, fixed=_words, members="bitdelta"),
    "binary-adapter": Row("binary-adapter(8, scale=2)", hooks=lambda: {0: binary_adapter(2.0)}),
    "said": Row(
        "said(d=20, at=attn.[qv]|ffn.down, seed=3)",
        hooks=lambda: {0: said(20, 3, [f"{layer}.{name}" for layer in range(4) for name in SITES])},
    ),
    "hypernet-adapter": Row("hypernet-adapter(8, embedding=6, code=5)", hooks=lambda: {0: hypernet()}),
}

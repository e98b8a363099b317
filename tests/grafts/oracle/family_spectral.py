"""dW with few coefficients in another basis, and sums of random bases."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi

import torch
from peft import C3AConfig, FourierFTConfig, RandLoraConfig, WaveFTConfig
from torch import Tensor

from polygraft.launch.demo.oracle.naive import Hook, Parts
from tests.grafts.oracle.equations import dense
from tests.grafts.oracle.peft_places import parts
from tests.grafts.oracle.row import LINEAR, Row

QV = ["q_proj", "v_proj", "down_proj"]


def fourierft(scale: float, seed: int) -> Hook:
    """dW_pq = s Re sum_jk E_jk exp(2 pi i (p j / d1 + q k / d2)) / (d1 d2) over the entries E (Gao et al. 2024, eq.
    3-4)."""

    def change(W: Tensor, p: Parts) -> Tensor:
        chosen = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(seed))[: len(p["c"])]
        q, k = torch.arange(W.shape[0], dtype=W.dtype), torch.arange(W.shape[1], dtype=W.dtype)
        total = torch.zeros_like(W)
        for c, entry in zip(p["c"], chosen.tolist(), strict=True):
            row, column = divmod(entry, W.shape[1])
            phase = 2 * pi * (q[:, None] * row / W.shape[0] + k * column / W.shape[1])
            total = total + c * phase.cos()
        return scale * total / W.numel()

    return dense(change)


def c3a() -> Hook:
    """Blocks of circulant matrices, each row the one above shifted to the right (Chen et al. 2024), over the
    width of the input as in PEFT."""

    def change(W: Tensor, p: Parts) -> Tensor:
        rows = []
        for kernels in p["c"]:
            blocks = [torch.stack([c.roll(shift) for shift in range(len(c))]) for c in kernels]
            rows.append(torch.cat(blocks, 1))
        return torch.cat(rows) / W.shape[1]

    return dense(change)


_RANDLORA = parts({"l": "randlora_lambda", "g": "randlora_gamma"}, shared={"A": "randlora_A", "B": "randlora_B"})
ROWS: Mapping[str, Row] = {
    "fourierft": Row("fourierft(n=20, scale=150, at=attn.[qv]|ffn.down)", hooks=lambda: {0: fourierft(150.0, 777)}),
    "fourierft by PEFT": Row(
        "fourierft(n=20, scale=150, at=attn.[qv]|ffn.down)",
        lambda: FourierFTConfig(n_frequency=20, scaling=150.0, target_modules=QV),
        place=parts({"c": "fourierft_spectrum"}),
        tolerance=1e-5,
    ),
    "waveft": Row(
        "waveft(n=50, scale=25, at=attn.[qv]|ffn.down)",
        lambda: WaveFTConfig(n_frequency=50, scaling=25.0, target_modules=QV),
        place=parts({"c": "waveft_spectrum"}),
    ),
    "c3a": Row("c3a(block=16)", hooks=lambda: {0: c3a()}),
    # At the last site only: what PEFT's backward hands to the layers before is the gradient of the transposed blocks.
    "c3a by PEFT": Row(
        "c3a(block=16, at=ffn.down)@1",
        lambda: C3AConfig(block_size=16, target_modules=["down_proj"], layers_to_transform=[1]),
        place=parts({"c": "c3a_kernel"}),
        tolerance=1e-5,
    ),
    "randlora": Row(
        "randlora(r=6, alpha=12)",
        lambda: RandLoraConfig(r=6, randlora_alpha=12, target_modules=LINEAR),
        place=_RANDLORA,
    ),
}

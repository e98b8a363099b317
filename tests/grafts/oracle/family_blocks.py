"""LoRAs made block by block, or of directions and strengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from peft import (
    BdLoraConfig,
    DeftConfig,
    DeloraConfig,
    GloraConfig,
    GraloraConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    TinyLoraConfig,
)
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, Parts, after
from polygraft.launch.demo.oracle.plain import SHARED, Place, split
from tests.grafts.oracle.equations import dense
from tests.grafts.oracle.peft_places import layer_of, parts
from tests.grafts.oracle.row import LINEAR, Row


def qalora(scale: float, group: int, bits: int) -> Hook:
    """x W~ + s (AvgPool(x) * L) A B with L inputs a pool, W~ = a round((W - b) / a) + b (Xu et al. 2023, eq. 1 and
    algorithm 1)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        W = module.get_parameter("weight")
        rounded = torch.cat([min_max(piece, bits) for piece in W.detach().split(group, dim=1)], dim=1)

        def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
            return x @ rounded.T + scale * (F.avg_pool1d(x, group) * group) @ p["A"].T @ p["B"]

        after(equation)(module, parts)

    return hook


def min_max(group: Tensor, bits: int) -> Tensor:
    """The rows of [out, L] on grids of their own, from their least value to their greatest."""
    b = group.min(dim=1, keepdim=True).values
    a = (group.max(dim=1, keepdim=True).values - b) / (2**bits - 1)
    return a * torch.round((group - b) / a) + b


def _tinylora(model: PeftModel, name: str, value: Tensor) -> Place:
    _, _, site, part = split(name)
    if part == "v":
        vectors = model.base_model.tinylora_v["default"]
        return Place(vectors["0" if site == SHARED else layer_of(model, name)._tinylora_v_key["default"]])
    kept = getattr(layer_of(model, name), f"tinylora_{part}")["default"]
    return Place(kept, (lambda t: t.T) if part == "B" else (lambda t: t))


def deft(scale: float, by: str) -> Hook:
    """W' = (I - P_proj) W + Q R with P_proj = P relu(P)^T, or Q Q^T of P = Q U (as PEFT documents DEFT)."""

    def change(W: Tensor, p: Parts) -> Tensor:
        P = p["P"].T
        Q = P if by == "relu" else torch.linalg.qr(P)[0]
        removed = Q @ (F.relu(P) if by == "relu" else Q).T @ W
        return (scale * Q @ p["R"] if "R" in p else 0) - removed

    return dense(change)


def psoft() -> Hook:
    """h + B (R - I) A x with R = diag(beta) (I + Q)(I - Q)^-1 diag(alpha) (PSOFT)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        r = len(p["A"])
        entries = iter(p["q"])
        upper = torch.stack([next(entries) if j > i else x.new_zeros(()) for i in range(r) for j in range(r)])
        Q, eye = upper.view(r, r) - upper.view(r, r).T, torch.eye(r, dtype=x.dtype)
        R = p["after"].diag() @ (eye + Q) @ torch.linalg.inv(eye - Q) @ p["before"].diag()
        return y + x @ p["A"].T @ (R - eye).T @ p["B"]

    return after(equation)


_DEFT = parts({"P": "deft_P", "R": "deft_R"}, transposed={"P": (0, 1)})


def _glora_config(kind: Literal["lora", "vector"]) -> GloraConfig:
    return GloraConfig(r=4, config_A_B=kind, config_C="none", config_D_E="none", target_modules=LINEAR)


def _glora(model: PeftModel, name: str, value: Tensor) -> Place:
    support, _, side = split(name)[3].partition("_")
    path = getattr(layer_of(model, name), f"glora_{support}")["default"]
    return Place(getattr(path, f"X{side}") if side else path.X)


def _bdlora(model: PeftModel, name: str, value: Tensor) -> Place:
    """PEFT keeps blocks below one another, those of B the other way round than ours."""
    part = split(name)[3]
    weight = getattr(layer_of(model, name), f"lora_{part}")["default"].weight
    if value.ndim == 2:
        return Place(weight, (lambda t: t.T) if part == "B" else (lambda t: t))
    if part == "A":
        return Place(weight, lambda t: t.view(value.shape))
    return Place(weight, lambda t: t.view(len(value), -1, value.shape[1]).transpose(1, 2))


_MISS = parts({"D": "miss_block"})
ROWS: Mapping[str, Row] = {
    "miss": Row("miss(r=6)", lambda: MissConfig(r=6, target_modules=LINEAR), place=_MISS),
    "miss with a period": Row(
        "miss(r=8, mini=4)", lambda: MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=LINEAR), place=_MISS
    ),
    "bat": Row("bat(r=8)", lambda: MissConfig(r=8, init_weights="bat", target_modules=LINEAR), place=_MISS),
    "gralora": Row(
        "gralora(r=4, alpha=6, k=2)",
        lambda: GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LINEAR),
        place=parts({"A": "gralora_A", "B": "gralora_B"}, transposed={"A": (1, 2)}),
    ),
    "qalora": Row("qalora(r=4, alpha=8, group=8, bits=3)", hooks=lambda: {0: qalora(2.0, 8, 3)}),
    "delora": Row(
        "delora(r=4)",
        lambda: DeloraConfig(r=4, target_modules=LINEAR),
        place=parts(
            {"A": "delora_A", "B": "delora_B", "l": "delora_lambda", "w": "delora_w_norm"}, transposed={"B": (0, 1)}
        ),
    ),
    "tinylora": Row("tinylora(r=2, u=3)", lambda: TinyLoraConfig(r=2, u=3, target_modules=LINEAR), place=_tinylora),
    "tied tinylora": Row(
        "tinylora(r=3, u=5, tied=1)",
        lambda: TinyLoraConfig(r=3, u=5, weight_tying=1.0, target_modules=LINEAR),
        place=_tinylora,
    ),
    "bdlora": Row(
        "bdlora(r=4, alpha=8, blocks=2)",
        lambda: LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=LINEAR,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"],
                target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
                nblocks=2,
            ),
        ),
        place=_bdlora,
    ),
    "deft": Row("deft(r=4, scale=2)", hooks=lambda: {0: deft(2.0, "relu")}),
    "deft by qr": Row("deft(r=4, by=qr)", hooks=lambda: {0: deft(1.0, "qr")}),
    "deft by PEFT": Row(
        "deft(r=4, scale=2)", lambda: DeftConfig(r=4, alpha=8, target_modules=LINEAR), place=_DEFT, tolerance=1e-5
    ),
    "para": Row("para(r=4)", hooks=lambda: {0: deft(1.0, "qr")}),
    "para by PEFT": Row(
        "para(r=4)",
        lambda: DeftConfig(r=4, para=True, decomposition_method="qr", target_modules=LINEAR),
        place=_DEFT,
        tolerance=1e-5,
    ),
    "psoft": Row("psoft(r=4)", hooks=lambda: {0: psoft()}),
    "glora": Row("glora(r=4)", lambda: _glora_config("lora"), place=_glora),
    "glora of vectors": Row("glora(kind=vector)", lambda: _glora_config("vector"), place=_glora),
}

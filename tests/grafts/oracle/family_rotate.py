"""Methods that rotate a projection's input or output, against PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel, RoadConfig
from torch import Tensor, nn

from polygraft.launch.demo.oracle.naive import Hook, Parts
from polygraft.launch.demo.oracle.plain import MODULES, Place, split
from tests.grafts.oracle.row import LINEAR, Row

# PEFT makes several factors on CUDA only, so `butterfly` stands in for it.
Find = Callable[[PeftModel, str, Tensor], Place]


def _in(path: Callable[[str], str], view: Mapping[str, Callable[[Tensor], Tensor]] = {}) -> Find:
    """Where PEFT keeps a part: `path(part)` inside the projection's module."""

    def place(model: PeftModel, name: str, value: Tensor) -> Place:
        _, layer, site, part = split(name)
        module = f"base_model.model.model.layers.{layer}.{MODULES[site]}"
        return Place(model.get_parameter(f"{module}.{path(part)}"), view.get(part, lambda t: t))

    return place


_oft = _in(lambda part: "oft_R.default.weight")
_boft = _in(lambda part: {"R": "boft_R", "g": "boft_s"}[part] + ".default", {"g": lambda t: t.view(-1)})
_hra = _in(lambda part: "hra_u.default", {"u": lambda t: t.T})
_road = _in(lambda part: f"road_{part}.default")


def _road_config(variant: str, group: int) -> RoadConfig:
    return RoadConfig(variant=variant, group_size=group, target_modules=LINEAR)


def butterfly(block: int) -> Hook:
    """x <- x B_m ... B_1, B_i = P_i diag(R_1 ... R_n) P_i^T, every R = (1 - Q) (1 + Q)^-1 with Q = (A - A^T) / 2 (Liu
    et al. 2024). P_i sorts the half blocks inside every run of 2^i blocks by parity, as PEFT's
    `block_butterfly_perm` does."""

    def matrix(factors: Tensor) -> Tensor:
        count, blocks = factors.shape[:2]
        width, half = blocks * block, block // 2
        whole = torch.eye(width, dtype=factors.dtype)
        for i in range(count):
            Q = (factors[i] - factors[i].mT) / 2
            one = torch.eye(block, dtype=Q.dtype)
            diagonal = torch.block_diag(*[(one - q) @ torch.linalg.inv(one + q) for q in Q])
            P = torch.zeros_like(whole)
            for channel in range(width):
                run, within = divmod(channel // half, 2 << i)
                source = 2 * within if within < 1 << i else 2 * (within - (1 << i)) + 1
                P[channel, (run * (2 << i) + source) * half + channel % half] = 1
            whole = P @ diagonal @ P.T @ whole
        return whole

    def hook(module: nn.Module, parts: Parts) -> None:
        module.register_forward_pre_hook(lambda _, args: (args[0] @ matrix(parts["R"]), *args[1:]))

    return hook


def row_scale() -> Hook:
    """W' = diag(s) W R, the bias as it is (Liu et al. 2024)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        bias = module.bias if isinstance(module.bias, Tensor) else 0.0
        module.register_forward_hook(lambda _, args, y: (y - bias) * parts["g"] + bias)

    return hook


ROWS: Mapping[str, Row] = {
    "oft": Row("oft(b=8)", lambda: OFTConfig(oft_block_size=8, target_modules=LINEAR), place=_oft),
    "oft exact": Row(
        "oft(b=16, neumann=0, at=attn.[qv]|ffn.down)@1",
        lambda: OFTConfig(
            oft_block_size=16,
            use_cayley_neumann=False,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[1],
        ),
        place=_oft,
    ),
    "boft": Row(
        "boft",
        lambda: BOFTConfig(boft_block_size=4, target_modules=LINEAR),
        place=_boft,
    ),
    "boft of three factors": Row(
        "boft(b=4, m=3, at=attn.k|ffn.down)",
        hooks=lambda: {0: butterfly(4), 1: row_scale()},
    ),
    "hra": Row("hra(r=4)", lambda: HRAConfig(r=4, target_modules=LINEAR), place=_hra),
    "road": Row("road(group=16)", lambda: _road_config("road_1", 16), place=_road),
    "road 2": Row("road(variant=2, group=32)", lambda: _road_config("road_2", 32), place=_road),
    "road 4": Row("road(variant=4, group=8)", lambda: _road_config("road_4", 8), place=_road),
}

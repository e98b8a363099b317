"""Methods that train some entries of W, against PEFT where it has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft import PeftModel, ShiraConfig, SupertuningConfig
from torch import Tensor, nn

from polygraft.grafts.sites import CROSS
from polygraft.launch.demo.oracle.naive import Hook, Parts
from polygraft.launch.demo.oracle.plain import MODULES, Place, split
from tests.grafts.oracle.row import LINEAR, Row

WIDTHS = {"attn.q": (64, 64), "attn.k": (32, 64), "attn.v": (32, 64), "attn.o": (64, 64)}
WIDTHS |= {"ffn.gate": (96, 64), "ffn.up": (96, 64), "ffn.down": (64, 96)}  # (out, in) of the tiny model
WIDTHS |= dict.fromkeys(CROSS, (32, 64))


def sparse_update(learnt: Callable[[Parts], Tensor] = lambda parts: parts["w"]) -> Hook:
    """W' x = W x + sum_k w_k x[j_k] e_(i_k): only the chosen entries of W change (PaFi, Liao et al. 2023, section 3.1;
    FishMask, Sung et al. 2021)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        assert isinstance(module, nn.Linear)
        rows, columns = parts["i"].detach().long().T

        def forward(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            change = torch.zeros_like(module.weight).index_put((rows, columns), learnt(parts)[:, 0])
            return y + args[0] @ change.T

        module.register_forward_hook(forward)

    return hook


def placed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values with distinct indices inside their matrices, in no order."""
    generator = torch.Generator().manual_seed(len(values))
    for name, value in values.items():
        _, _, site, part = split(name)
        if part == "i":
            out, width = WIDTHS[site]
            if value.shape[1] == 1:
                values[name] = torch.randperm(out, generator=generator)[: len(value), None].double()
            else:
                flat = torch.randperm(out * width, generator=generator)[: len(value)]
                values[name] = torch.stack([flat // width, flat % width], dim=1).double()
    return values


def _shira(model: PeftModel, name: str, value: Tensor) -> Place:
    module, part = _module(model, name)
    if part == "w":
        return Place(module.shira_weight["default"], lambda t: t[:, None])
    return Place(module.shira_indices["default"], lambda t: t.T)


def _super(model: PeftModel, name: str, value: Tensor) -> Place:
    module, part = _module(model, name)
    match part:
        case "w":
            return Place(module.supertuning_values["default"], lambda t: t[:, None])
        case "A":
            return Place(module.supertuning_lora_A["default"].weight)
        case "B":
            return Place(module.supertuning_lora_B["default"].weight, lambda t: t.T)
    flat = value[:, 0] * module.in_features + value[:, 1]
    module.supertuning_indices["default"].copy_(flat)
    return Place(value.clone())


def _module(model: PeftModel, name: str) -> tuple[nn.Module, str]:
    _, layer, site, part = split(name)
    return model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}"), part


ROWS: Mapping[str, Row] = {
    "shira": Row("shira(r=2)", lambda: ShiraConfig(r=2, target_modules=LINEAR), place=_shira, fixed=placed),
    "pafi": Row("pafi(density=0.05)", hooks=lambda: {0: sparse_update()}, fixed=placed),
    "supertuning": Row(
        "supertuning(sparsity=0.95)",
        lambda: SupertuningConfig(sparsity=0.95, target_modules=LINEAR),
        place=_super,
        fixed=placed,
    ),
    "supra": Row(
        "supertuning(sparsity=0.95, r=4, at=attn.[qv]|ffn.down)",
        lambda: SupertuningConfig(sparsity=0.95, r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        place=_super,
        fixed=placed,
    ),
}

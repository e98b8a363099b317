"""VeRA and other LoRAs whose factors are made of fewer numbers."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel, VeraConfig
from torch import Tensor

from polygraft.launch.demo.oracle.plain import MODULES, SHARED, Place, split
from tests.grafts.oracle.row import Row


def _vera(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, part = split(name)
    if site == SHARED:
        tensor = getattr(model.base_model, f"vera_{part}")["default"]
        return Place(tensor, (lambda t: t.T) if part == "B" else (lambda t: t))
    module = model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}")
    return Place(getattr(module, f"vera_lambda_{part}")["default"])


ROWS: Mapping[str, Row] = {
    "vera": Row(
        "vera(r=8, at=attn.[qv]|ffn.down)",
        lambda: VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        place=_vera,
    ),
}

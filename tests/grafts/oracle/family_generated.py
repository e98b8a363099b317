"""Methods whose dense dW is generated (LoHa and its kin)."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoHaConfig, PeftModel
from torch import Tensor

from polygraft.launch.demo.oracle.plain import MODULES, Place, split
from tests.grafts.oracle.row import LINEAR, Row


def _loha(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, part = split(name)
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    module = model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}")
    return Place(getattr(module, names[part])["default"])


ROWS: Mapping[str, Row] = {
    "loha": Row("loha(r=4, alpha=8)", lambda: LoHaConfig(r=4, alpha=8, target_modules=LINEAR), place=_loha),
}

"""LoRAs whose factors are read out of something shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftModel, UniLoraConfig, VBLoRAConfig
from torch import Tensor

from polygraft.launch.demo.oracle.plain import Place, split
from tests.grafts.oracle.peft_places import layer_of, parts
from tests.grafts.oracle.row import LINEAR, Row


@dataclass
class _UniLora:
    """PEFT keeps the scales element by element at every site, where we keep one a vector element."""

    scale: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, model: PeftModel, name: str, value: Tensor) -> Place:
        part = split(name)[3]
        if part == "theta":
            return Place(model.base_model.unilora_theta_d["default"])
        if part == "scale":
            self.scale = value.to(model.base_model.unilora_theta_d["default"].dtype)
        else:
            layer, index = layer_of(model, name), value.long() if part == "index_A" else value.long().T
            getattr(layer, f"unilora_indices_{part[-1]}")["default"] = index
            getattr(layer, f"unilora_scales_{part[-1]}")["default"] = self.scale[index]
        return Place(torch.empty_like(value))


def _indices(values: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(0, 24, value.shape, generator=generator).double() if ".index_" in name else value
        for name, value in values.items()
    }


ROWS: Mapping[str, Row] = {
    "vblora": Row(
        "vblora(r=3, vectors=10, length=16, k=2)",
        lambda: VBLoRAConfig(r=3, num_vectors=10, vector_length=16, topk=2, target_modules=LINEAR),
        place=parts({"A": "vblora_logits_A", "B": "vblora_logits_B"}, shared={"bank": "vblora_vector_bank"}),
    ),
    "unilora": Row(
        "unilora(r=3, d=24)",
        lambda: UniLoraConfig(r=3, theta_d_length=24, target_modules=LINEAR),
        place=_UniLora(),
        fixed=_indices,
    ),
}

"""The eight methods as rows: how we write them, and the independent model that says what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from torch import Tensor

from polygraft.cluster.launch.demo.oracle.naive import (
    Hook,
    bitfit,
    ia3_after,
    ia3_before,
    lora,
    naive,
    parallel,
    serial,
)
from polygraft.cluster.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.cluster.launch.demo.oracle.plain import Oracle
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sizes import tensors
from polygraft.grafts.spec import GraftSpec

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Row:
    """A graft as users write it, and its oracle: a PEFT config, or the equation of each slot in the order they
    apply."""

    text: str
    config: Callable[[], PeftConfig] | None = None
    hooks: Callable[[], Mapping[int, Hook]] = dict

    @property
    def spec(self) -> GraftSpec:
        return parse(self.text)

    def oracle(self, folder: Path, values: Mapping[str, Tensor], dtype: torch.dtype) -> Oracle:
        if self.config is not None:
            return peft_oracle(folder, self.config(), values, dtype)
        return naive(folder, self.hooks(), values, dtype)


METHODS: Mapping[str, Row] = {
    "lora": Row("lora(r=8, alpha=16)", lambda: LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)),
    "rslora": Row(
        "rslora(r=4, alpha=6, at=attn.[qv]|ffn.down)@1",
        lambda: LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[1],
            use_rslora=True,
        ),
    ),
    "dora": Row("dora(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=True)),
    "ia3": Row(
        "ia3",
        lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "prefix": Row("prefix(5)", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "bitfit": Row("bitfit", hooks=lambda: {0: bitfit()}),
    "serial": Row("serial(8)", hooks=lambda: {0: serial()}),
    "parallel": Row("parallel(16)", hooks=lambda: {0: parallel(4.0)}),
}

# Unions, and the methods above that hooks can express too: two oracles that must agree.
MORE: Mapping[str, Row] = {
    "mix and match": Row(
        "prefix(3) + parallel(8, scale=2) + lora(r=2, alpha=4, at=attn.*)",
        hooks=lambda: {1: parallel(2.0), 2: lora(2.0)},
    ),
    "scale and shift of one output": Row(
        "bitfit(at=attn.*) + ia3 + lora(r=2, alpha=1)",  # written in another order than they apply in
        hooks=lambda: {2: ia3_before(), 3: lora(0.5), 1: ia3_after(), 0: bitfit()},
    ),
    "both adapters": Row(
        "serial(4) + parallel(4)@0 + rslora(r=4, alpha=2, at=q_proj)@1",
        hooks=lambda: {0: serial(), 1: parallel(4.0), 2: lora(2 / sqrt(4))},  # the serial one taps the bare output
    ),
    "input of a fused projection": Row(
        "ia3(at=attn.o, feedforward=attn.q|ffn.up)", hooks=lambda: {0: ia3_after(), 1: ia3_before()}
    ),
    "prefix by the cache": Row("prefix(4)"),
}


def random_tensors(spec: GraftSpec, shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Tensors of a graft that has been trained: none at its starting value, float64 that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    centre = {"g": 1.0, "m": 0.8}  # 0.8 is about the row norm of the tiny model's weights
    return {
        t.name: (centre.get(t.part, 0.0) + 0.15 * torch.randn(t.shape, generator=generator)).double()
        for t in tensors(spec, shape)
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())

"""The demo's eight grafts as independent models: by PEFT where PEFT has the method, else by the paper's equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from torch import Tensor

from polygraft.launch.demo.oracle.naive import Hook, bitfit, naive, parallel, serial
from polygraft.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.launch.demo.oracle.plain import Oracle

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LINEAR = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]

_PEFT: Mapping[str, Callable[[], PeftConfig]] = {
    "lora(r=8, alpha=16, at=attn.*)": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=_ATTENTION),
    "lora(r=16, alpha=32)": lambda: LoraConfig(r=16, lora_alpha=32, target_modules=_LINEAR),
    "dora(r=8, alpha=16)": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=_LINEAR, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix(10)": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10),
}
_EQUATIONS: Mapping[str, Callable[[], Hook]] = {
    "bitfit": bitfit,
    "serial(32)": serial,
    "parallel(32)": lambda: parallel(4.0),
}


def solo(peft: str, folder: Path, start: Mapping[str, Tensor]) -> Oracle:
    """The graft `peft` alone on the backbone in `folder`, in float32 and with `start` as its tensors. KeyError for one
    that is not of the demo."""
    if peft in _PEFT:
        return peft_oracle(folder, _PEFT[peft](), start, torch.float32)
    return naive(folder, {0: _EQUATIONS[peft]()}, start, torch.float32)

"""PEFT's models as training leaves them, and their folders."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from polygraft.launch.demo.oracle.peft_oracle import first_task
from polygraft.launch.demo.oracle.plain import plain_model


def trained(backbone: Path, config: PeftConfig, target: Path, *, by: float = 0.1) -> PeftModel:
    """A model of the config, every trained number of it changed, saved to `target`."""
    model = first_task(get_peft_model(plain_model(backbone, torch.float32), config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)  # type: ignore[misc]
    model.save_pretrained(str(target))
    return model

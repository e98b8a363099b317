"""PEFT's side of both benchmarks: the backbone as transformers loads it, with some of the material's grafts on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from material import Material
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def load(material: Material, variant: str) -> LlamaForCausalLM:
    """The bare backbone in dtype `variant`, used once: its file is only mapped until then."""
    model = AutoModelForCausalLM.from_pretrained(material.backbone, dtype=getattr(torch, variant))
    assert isinstance(model, LlamaForCausalLM)
    with torch.inference_mode():
        model(input_ids=torch.tensor([material.prompts[0]]))
    return model


def adapt(base: LlamaForCausalLM, material: Material, grafts: Sequence[int], *, trainable: bool = False) -> PeftModel:
    """`grafts` as adapters `name(graft)`, in the backbone's own dtype.

    PEFT's default would keep adapters in float32 beside a bf16 backbone and cast around every one of them: slower.
    """
    first, *others = grafts
    model = PeftModel.from_pretrained(
        base,
        material.graft_folder(first),
        adapter_name=name(first),
        is_trainable=trainable,
        autocast_adapter_dtype=False,
    )
    for graft in others:
        model.load_adapter(
            material.graft_folder(graft), name(graft), is_trainable=trainable, autocast_adapter_dtype=False
        )
    return model.train() if trainable else model.eval()


def name(graft: int) -> str:
    return f"graft-{graft}"

"""A graft alone, by Hugging Face PEFT: its model, with given tensors copied into its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PolyModel, get_peft_model
from torch import Tensor

from polygraft.launch.demo.oracle.plain import MODULES, Oracle, Place, plain_llama, plain_model, read, split

Find = Callable[[PeftModel, str, Tensor], Place]


def peft_oracle(
    folder: Path, config: PeftConfig, values: Mapping[str, Tensor], dtype: torch.dtype, place: Find | None = None
) -> Oracle:
    """`config` is consumed. Every trainable parameter of PEFT's model is one of `values`, or the assertion fails.

    `place` finds the tensors of methods beyond LoRA, DoRA, IA3 and prefix tuning; it may return parameters that PEFT
    does not train, or plain buffers.
    """
    model = get_peft_model(plain_llama(folder, dtype), config, autocast_adapter_dtype=False).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # PEFT makes a prefix in float32 whatever the model
    first_task(model)
    places = {name: (place or _place)(model, name, value) for name, value in values.items()}
    trained = {name: where for name, where in places.items() if where.parameter.requires_grad}
    assert sum(values[n].numel() for n in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, found in places.items():
            found.view(found.parameter).copy_(values[name])
    return Oracle(lambda ids: read(model, ids), trained)


def loaded(folder: Path, adapter: Path, dtype: torch.dtype) -> PeftModel:
    """PEFT's model as a user loads it from a saved folder."""
    return first_task(PeftModel.from_pretrained(plain_model(folder, dtype), str(adapter)))


def first_task(model: PeftModel) -> PeftModel:
    """The same model; Poly, which is to be told the task of every sequence, takes each for the first."""
    if isinstance(model.base_model, PolyModel):
        model.base_model._register_pre_hooks(torch.zeros(1, dtype=torch.long))  # type: ignore[no-untyped-call]
    return model


def _place(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, part = split(name)
    if site == "kv":
        return Place(_prompt(model), partial(_rows, index=2 * layer + (part == "v"), width=value.shape[1]))
    module = f"base_model.model.model.layers.{layer}.{MODULES[site]}"
    match part:
        case "A":
            return Place(model.get_parameter(f"{module}.lora_A.default.weight"))
        case "B":
            return Place(model.get_parameter(f"{module}.lora_B.default.weight"), lambda t: t.T)
        case "m":
            return Place(model.get_parameter(f"{module}.lora_magnitude_vector.default.weight"))
        case "g":
            return Place(model.get_parameter(f"{module}.ia3_l.default"), lambda t: t.view(-1))
    raise KeyError(name)


def _prompt(model: PeftModel) -> Tensor:
    return model.get_parameter("prompt_encoder.default.embedding.weight")


def _rows(prompt: Tensor, index: int, width: int) -> Tensor:
    """One layer's keys or values, [p, kv_width], inside the embedding [p, layers * 2 * kv_width]."""
    return prompt.view(len(prompt), -1, width)[:, index]

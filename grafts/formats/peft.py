"""The folder that Hugging Face PEFT reads: `adapter_config.json` beside `adapter_model.safetensors`, for LoRA and DoRA.

The keys are those of peft 0.21's save_pretrained; its loader only warns about missing or unknown ones, here they are
errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import isclose, sqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.check import FormatError, check
from polygraft.grafts.grammar import from_peft_config
from polygraft.grafts.runtime.adopt import share
from polygraft.grafts.sites import ModelShape, module_path, resolve, sublayers
from polygraft.grafts.sizes import TensorSpec, tensors
from polygraft.grafts.spec import Branch, GraftSpec, Norm, SpecError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def exportable(spec: GraftSpec, shape: ModelShape) -> bool:
    """Whether PEFT has the graft: one LoRA on projections, with or without DoRA's norm at the same places, which are
    whole modules that PEFT can tell from the others."""
    parts = _parts(spec)
    return parts is not None and _targets(parts[0], shape) is not None


def export(
    folder: Path, spec: GraftSpec, values: Mapping[str, Tensor], *, shape: ModelShape, base: str | None = None
) -> None:
    """Write the two files into `folder`, which exists; `base` is the backbone's public name, null when not given.

    Raises FormatError for a graft that PEFT has no equal for, or tensors that are not the graft's.
    """
    parts = _parts(spec)
    if parts is None:
        raise FormatError(f"peft: {spec.method!r} has no equal in PEFT here; lora, rslora and dora have")
    targets = _targets(parts[0], shape)
    if targets is None:
        raise FormatError(f"peft: no target_modules of {shape.arch} mean just {parts[0].at!r}; keep the native folder")
    check(spec, values, shape)
    files = {
        _key(tensor, shape): (values[tensor.name].T if tensor.part == "B" else values[tensor.name])
        .detach()
        .to(torch.float32)
        .contiguous()
        .clone()
        for tensor in tensors(spec, shape)
    }
    save_file(files, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(*parts, spec.method, targets, shape, base), indent=2) + "\n")


def load(folder: Path, shape: ModelShape) -> tuple[GraftSpec, dict[str, Tensor]]:
    """The graft of a PEFT folder, float32, by our names. That of a fused module (GPT-2's c_attn) becomes a branch of
    the same W + dW for each of its projections: the same A, and their rows of B.

    Raises FormatError for pickled weights, a file that is a link out of the folder, a config that asks for more than
    LoRA, rsLoRA or DoRA on projections, a key that is missing or unknown, a wrong shape, a value that is not finite.
    """
    config = _described(folder)
    try:
        spec = from_peft_config(config)
        expected = {tensor: _key(tensor, shape) for tensor in tensors(spec, shape)}
        stored = load_file(_file(folder, WEIGHTS))
    except (SpecError, SafetensorError, OSError) as error:
        raise FormatError(f"{folder.name}: {error}") from None
    if set(expected.values()) != stored.keys():
        odd = sorted(set(expected.values()) ^ stored.keys())
        raise FormatError(f"{folder.name}/{WEIGHTS}: {odd[:3]} are missing or unknown ({len(odd)} in all)")
    values = {
        tensor.name: _own(stored[key], tensor, shape).to(torch.float32).contiguous().clone()
        for tensor, key in expected.items()
    }
    check(spec, values, shape)
    return spec, values


def _own(stored: Tensor, tensor: TensorSpec, shape: ModelShape) -> Tensor:
    """Our tensor in PEFT's one of its module."""
    assert tensor.site is not None
    if tensor.part == "A":
        return stored
    beside = architecture(shape.arch).beside(tensor.site.name)
    width = sum(shape.dims(name)[1] for name in beside)
    if len(beside) > 1 and len(stored) != width:
        raise FormatError(f"{tensor.name}: the module's {len(stored)} rows are not {width}")
    rows = stored if len(beside) == 1 else share(stored, tensor.site.name, shape)
    return rows.T if tensor.part == "B" else rows


def _parts(spec: GraftSpec) -> tuple[Branch, Norm | None] | None:
    if any(slot.form is not None for slot in spec.slots):
        return None
    match spec.slots:
        case (Branch() as branch,):
            norm = None
        case (Branch() as branch, Norm() as norm):
            if (norm.at, norm.layers) != (branch.at, branch.layers):
                return None
        case _:
            return None
    return None if branch.act != "identity" or branch.tap == "output" or sublayers(branch.at) else (branch, norm)


def _targets(branch: Branch, shape: ModelShape) -> tuple[str, ...] | None:
    names = dict.fromkeys(site.name for site in resolve(branch, shape))
    return architecture(shape.arch).targets(names)


def _config(
    branch: Branch, norm: Norm | None, method: str, targets: tuple[str, ...], shape: ModelShape, base: str | None
) -> Mapping[str, object]:
    stable = method.startswith("rslora")
    alpha = branch.scale * (sqrt(branch.rank) if stable else branch.rank)
    whole = round(alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if shape.causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": branch.rank,
        "lora_alpha": whole if isclose(alpha, whole, rel_tol=1e-12) else alpha,
        **({"lora_dropout": branch.dropout} if branch.dropout else {}),
        "target_modules": list(targets),
        **({"fan_in_fan_out": True} if architecture(shape.arch).transposed else {}),
        "layers_to_transform": None if branch.layers is None else sorted(set(branch.layers)),
        "bias": "none",
        "use_dora": norm is not None,
        "use_rslora": stable,
    }


def _key(tensor: TensorSpec, shape: ModelShape) -> str:
    assert tensor.site is not None
    module = f"base_model.model.{architecture(shape.arch).backbone}.{module_path(tensor.site, shape.arch)}"
    return f"{module}.lora_magnitude_vector" if tensor.part == "m" else f"{module}.lora_{tensor.part}.weight"


def _described(folder: Path) -> Mapping[str, object]:
    """The config, less the fields that say how the adapter was made but not what it is."""
    try:
        config = json.loads(_file(folder, CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder.name}/{CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{folder.name}/{CONFIG}: not an object")
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise FormatError(f"{folder.name}/{CONFIG}: peft_type {kind!r} is not read from PEFT folders; choices: LORA")
    return dict(_settled(config))


def _settled(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        # These starting values leave W as it is; PiSSA's and its like (refused later) were trained beside another W.
        started = key == "init_lora_weights" and value in ("gaussian", "eva", "orthogonal")
        if not started and key != "eva_config":
            yield key, value


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        pickled = sorted(found.name for pattern in ("*.bin", "*.pt", "*.pth") for found in folder.glob(pattern))
        why = f"; {pickled[0]} can run code when loaded: convert it to safetensors" if pickled else ""
        raise FormatError(f"{folder.name}: holds no {name}{why}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FormatError(f"{folder.name}/{name}: is a link out of the folder")
    return path

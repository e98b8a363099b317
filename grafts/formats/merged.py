"""The whole model with a graft folded in: a folder of config, safetensors and tokenizer that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import CONFIG, BackboneFiles
from polygraft.grafts.formats.check import FormatError, refuse_head
from polygraft.grafts.formats.tensor_file import write_tensors
from polygraft.grafts.merge import Fold
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import Affine
from polygraft.kernels.common.atomic import whole_folder

_CONFIG, _INDEX = CONFIG, "model.safetensors.index.json"
_BESIDE = (".json", ".jinja", ".model", ".txt")  # tokenizer, chat template, generation config
_BIASES = {"attention_bias", "mlp_bias"}  # how a transformers config asks for projections with biases


def export(target: Path, graft: BoundGraft, values: Mapping[str, Tensor], *, backbone: Path) -> None:
    """Write the model in folder `backbone` with the graft's W + dW, computed in float32 and rounded once to each
    weight's own type, to the new folder `target`; whole or not at all.

    Where the graft adds biases that the model has not, its config says so and all its projections get one. Raises
    SpecError for a graft that cannot be folded, FormatError for biases that the architecture has no place for.
    """
    if target.exists():
        raise FormatError(f"{target}: exists already; name a folder that does not")
    refuse_head(graft)
    config = json.loads((backbone / _CONFIG).read_text())
    if any(isinstance(slot, Affine) and slot.shift for slot in graft.spec.slots):
        config |= dict.fromkeys(_BIASES & config.keys(), True)
    try:
        with whole_folder(target) as draft:
            places: dict[str, str] = {}
            stored = BackboneFiles(backbone)
            for shard, tensors in _folded(stored, graft, values, _keys(config, stored.shape)):
                write_tensors(tensors, draft / shard, metadata={"format": "pt"})
                places |= dict.fromkeys(tensors, shard)
            if len(set(places.values())) > 1:
                (draft / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1))
            for file in backbone.iterdir():
                if file.suffix in _BESIDE and file.name not in (_CONFIG, _INDEX) and not file.name.startswith("."):
                    shutil.copy(file, draft)
            (draft / _CONFIG).write_text(json.dumps(config, indent=2))
    except SafetensorError as error:
        raise FormatError(f"{backbone.name}: {error}") from None


def _folded(
    stored: BackboneFiles, graft: BoundGraft, values: Mapping[str, Tensor], asked: set[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File by file, its name and the tensors that it is to hold; `asked` are all that the model is to have."""
    fold = Fold(graft, values, stored.weight, stored.bias)
    for site in sorted(fold.sites):
        if (key := f"{stored.module(site)}.weight") not in stored.files:
            raise FormatError(f"{key}: is not in the backbone's files, which name it otherwise; keep the graft apart")
    for shard in stored.shards:
        tensors = load_file(shard)
        for name, tensor in list(tensors.items()):
            new = f"{name.removesuffix('weight')}bias"
            if new in asked and new not in stored.files:
                tensors[new] = tensor.new_zeros(len(tensor))
        for site in fold.sites:
            weight, bias = (f"{stored.module(site)}.{part}" for part in ("weight", "bias"))
            if weight in tensors or bias in tensors:
                merged = fold.at(site)
                if merged.bias is not None and bias not in asked:
                    arch = stored.shape.arch
                    raise FormatError(f"{bias}: {arch} has no such bias, so this graft cannot be merged into it")
                for key, value in ((weight, merged.weight), (bias, merged.bias)):
                    if key in tensors and value is not None:
                        stored.put(tensors[key], site, value)
        yield shard.name, tensors


def _keys(config: Mapping[str, object], shape: ModelShape) -> set[str]:
    """Names of all tensors of a model of this config."""
    import transformers
    from transformers import AutoConfig

    asked: dict[str, Any] = dict(config)
    kind = getattr(transformers, architecture(shape.arch).auto)
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(**asked))
    return set(model.state_dict())

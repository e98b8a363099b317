"""The whole model with a graft folded in: a folder of config, safetensors and tokenizer that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.merge import Fold
from polygraft.grafts.sites import ModelShape, Site, module_path
from polygraft.grafts.spec import Affine, GraftSpec

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_BESIDE = (".json", ".jinja", ".model", ".txt")  # tokenizer, chat template, generation config
_BIASES = {"attention_bias": True, "mlp_bias": True}  # how a transformers config asks for projections with biases


def export(target: Path, spec: GraftSpec, values: Mapping[str, Tensor], *, backbone: Path) -> None:
    """Write the model in folder `backbone` with the graft's W + dW, computed in float32 and rounded once to each
    weight's own type, to the new folder `target`; whole or not at all.

    Where the graft adds biases that the model has not, its config says so and all its projections get one. Raises
    SpecError for a graft that cannot be folded, FormatError for biases that the architecture has no place for, and for
    encoders and weights that lie fused or transposed.
    """
    table = architecture(str(json.loads((backbone / _CONFIG).read_text()).get("model_type")))
    if table.transposed or table.interleaved or not table.causal:
        raise FormatError(f"{table.model_type}: a merged model of it is not written; serve the graft beside it")
    if target.exists():
        raise FormatError(f"{target}: exists already; name a folder that does not")
    config = json.loads((backbone / _CONFIG).read_text())
    if any(isinstance(slot, Affine) and slot.shift for slot in spec.slots):
        config |= _BIASES
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        places: dict[str, str] = {}
        for shard, tensors in _folded(_Stored(backbone), spec, values, config):
            save_file(tensors, draft / shard, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, shard)
        if len(set(places.values())) > 1:
            (draft / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1))
        for file in backbone.iterdir():
            if file.suffix in _BESIDE and file.name not in (_CONFIG, _INDEX) and not file.name.startswith("."):
                shutil.copy(file, draft)
        (draft / _CONFIG).write_text(json.dumps(config, indent=2))
        for path in (draft, *draft.iterdir()):  # mkdtemp and safetensors shut out others
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(draft, target)
    except SafetensorError as error:
        raise FormatError(f"{backbone.name}: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Stored:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.shards = sorted(folder.glob("*.safetensors"))
        self.files: dict[str, Path] = {}
        for shard in self.shards:
            with safe_open(shard, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), shard)

    def wide(self, key: str) -> Tensor:
        """In float32 or wider."""
        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _folded(
    stored: _Stored, spec: GraftSpec, values: Mapping[str, Tensor], config: Mapping[str, object]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File by file, its name and the tensors that it is to hold."""
    shape = ModelShape.from_config(config)
    table = architecture(shape.arch)

    def module(site: Site) -> str:
        return f"{table.backbone}.{module_path(site, shape.arch)}"

    def bias(site: Site) -> Tensor | None:
        return stored.wide(f"{module(site)}.bias") if f"{module(site)}.bias" in stored.files else None

    fold = Fold(spec, shape, values, lambda site: stored.wide(f"{module(site)}.weight"), bias)
    sites = {module(site): site for site in fold.sites}
    asked = _keys(config)
    for shard in stored.shards:
        tensors = load_file(shard)
        for name, weight in list(tensors.items()):
            new = f"{name.removesuffix('weight')}bias"
            if new in asked and new not in stored.files:
                tensors[new] = weight.new_zeros(len(weight))
        for name in sites.keys() & {key.rpartition(".")[0] for key in tensors}:
            merged = fold.at(sites[name])
            if merged.bias is not None and f"{name}.bias" not in asked:
                raise FormatError(f"{name}.bias: {shape.arch} has no such bias, so this graft cannot be merged into it")
            for key, value in ((f"{name}.weight", merged.weight), (f"{name}.bias", merged.bias)):
                if key in tensors and value is not None:
                    tensors[key] = value.to(tensors[key].dtype)
        yield shard.name, tensors


def _keys(config: Mapping[str, object]) -> set[str]:
    """Names of all tensors of a model of this config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    asked: dict[str, Any] = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**asked))  # type: ignore[no-untyped-call]
    return set(model.state_dict())

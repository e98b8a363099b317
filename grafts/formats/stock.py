"""The backbone's own files, for formats that keep a graft together with what it grows on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.sites import ModelShape, Site, module_path

CONFIG = "config.json"


class Stock:
    """The tensors of a model's folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.shards = sorted(folder.glob("*.safetensors"))
        self.config: Mapping[str, object] = json.loads((folder / CONFIG).read_text())
        self.shape = ModelShape.from_config(self.config)
        self.files: dict[str, Path] = {}
        for shard in self.shards:
            with safe_open(shard, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), shard)

    @cached_property
    def tied(self) -> bool:
        """Whether the head multiplies with the embeddings."""
        apart = any(key.endswith(("lm_head.weight", "embed_out.weight")) for key in self.files)
        return bool(self.config.get("tie_word_embeddings", not apart))

    def wide(self, key: str) -> Tensor:
        """In float32 or wider."""
        if key not in self.files:
            raise FormatError(f"{key}: is not in the backbone's files")
        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def norm(self, site: Site) -> tuple[Tensor, float]:
        """A norm's weight as it lies, and what the architecture adds to it to have the factor."""
        table = architecture(self.shape.arch)
        key = f"{table.backbone}.{module_path(site, self.shape.arch)}"
        if f"{key}.bias" in self.files:
            raise FormatError(f"{key}: has a bias, which a scale of the norm changes, too; keep the native folder")
        return self.wide(f"{key}.weight"), table.norm_offset

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
from polygraft.grafts.sites import ModelShape, Site, model_path

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

    def weight(self, site: Site) -> Tensor:
        """W [out, in] of a projection that has a module of its own."""
        if len(architecture(self.shape.arch).beside(site.name)) > 1:
            raise FormatError(f"{site}: is but a part of a module of {self.shape.arch}")
        return Projections(self, self.shape).weight(site)

    def norm(self, site: Site) -> tuple[Tensor, Tensor | None, float]:
        """A norm's weight as it lies, its bias, and what the architecture adds to the weight to have the factor."""
        table = architecture(self.shape.arch)
        key = model_path(site, self.shape)
        bias = self.wide(f"{key}.bias") if f"{key}.bias" in self.files else None
        return self.wide(f"{key}.weight"), bias, table.norm_offset


class Projections:
    """A module of a model file as the projections in it: rows of a weight [out, in], which may lie transposed."""

    def __init__(self, stored: Stock, shape: ModelShape) -> None:
        self._stored, self._shape, self._table = stored, shape, architecture(shape.arch)

    def module(self, site: Site) -> str:
        return model_path(site, self._shape)

    def weight(self, site: Site) -> Tensor:
        key = f"{self.module(site)}.weight"
        return self.part(self._stored.wide(key), site)

    def bias(self, site: Site) -> Tensor | None:
        key = f"{self.module(site)}.bias"
        return self._stored.wide(key)[self._rows(site)] if key in self._stored.files else None

    def shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the module's weight as it lies, and of its bias."""
        columns = self._shape.dims(site.name)[0]
        rows = sum(self._shape.dims(name)[1] for name in self._table.beside(site.name))
        return (columns, rows) if self._table.transposed else (rows, columns), (rows,)

    def part(self, tensor: Tensor, site: Site) -> Tensor:
        """The site's rows of a module's weight or bias."""
        return self._straight(tensor)[self._rows(site)]

    def put(self, tensor: Tensor, site: Site, value: Tensor) -> None:
        """Replace the site's rows of a module's weight or bias, rounding to its type."""
        self._straight(tensor)[self._rows(site)] = value.to(tensor.dtype)

    def _straight(self, tensor: Tensor) -> Tensor:
        return tensor.T if self._table.transposed and tensor.ndim == 2 else tensor

    def _rows(self, site: Site) -> Tensor:
        beside = self._table.beside(site.name)
        widths = [self._shape.dims(name)[1] for name in beside]
        rows, index = torch.arange(sum(widths)), beside.index(site.name)
        if self._table.interleaved and len(beside) > 1:
            return rows.view(self._shape.heads, len(beside), -1)[:, index].flatten()
        return rows.split_with_sizes(widths)[index]

"""The backbone's own files, for formats that keep a graft together with what it grows on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.sites import NORMS, ModelShape, Site, model_path

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"


class BackboneFiles:
    """The tensors of a model's folder, read one at a time; a module's are the rows of one projection or of several, and
    may lie transposed. Only reading one needs torch: what the files are called and hold is known without."""

    def __init__(self, folder: Path) -> None:
        self.shards = sorted(folder.glob("*.safetensors"))
        self.config: Mapping[str, object] = json.loads((folder / CONFIG).read_text())
        self.shape = ModelShape.from_config(self.config)
        self._table = architecture(self.shape.arch)
        self.files: dict[str, Path] = {}
        for shard in self.shards:
            with safe_open(shard, "np") as file:
                self.files |= dict.fromkeys(file.keys(), shard)

    @cached_property
    def tied(self) -> bool:
        """Whether the head multiplies with the embeddings."""
        untied = any(key.endswith(("lm_head.weight", "embed_out.weight")) for key in self.files)
        return bool(self.config.get("tie_word_embeddings", not untied))

    def wide(self, key: str) -> Tensor:
        """In float32 or wider."""
        import torch

        if key not in self.files:
            raise FormatError(f"{key}: is not in the backbone's files")
        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def module(self, site: Site) -> str:
        """Where the files keep what holds the site, maybe among others."""
        return model_path(site, self.shape)

    def weight(self, site: Site) -> Tensor:
        """W [out, in] of a projection."""
        return self.part(self.wide(f"{self.module(site)}.weight"), site)

    def whole(self, site: Site) -> Tensor:
        """W of a projection that has a module of its own."""
        if len(self._table.fused_with(site.name)) > 1:
            raise FormatError(f"{site}: is but a part of a module of {self.shape.arch}")
        return self.weight(site)

    def biased(self, site: Site) -> bool:
        """Whether the site's module has a bias."""
        return f"{self.module(site)}.bias" in self.files

    def bias(self, site: Site) -> Tensor | None:
        """A projection's or norm's bias, where it has one."""
        return self.part(self.wide(f"{self.module(site)}.bias"), site) if self.biased(site) else None

    @property
    def norm_offset(self) -> float:
        """What the architecture adds to a norm's weight to have its factor."""
        return self._table.norm_offset

    def part(self, tensor: Tensor, site: Site) -> Tensor:
        """The site's rows of its module's weight or bias."""
        return self._straight(tensor)[self._rows(site)]

    def put(self, tensor: Tensor, site: Site, value: Tensor) -> None:
        """Replace the site's rows of its module's weight or bias, rounding to its type."""
        self._straight(tensor)[self._rows(site)] = value.to(tensor.dtype)

    def _rows(self, site: Site) -> slice | list[int]:
        return slice(None) if site.name in NORMS else self.shape.rows(site.name)

    def _straight(self, tensor: Tensor) -> Tensor:
        return tensor.T if self._table.transposed and tensor.ndim == 2 else tensor

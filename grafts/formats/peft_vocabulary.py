"""What a PEFT folder holds of the embeddings and the head: whole tables that were trained (`modules_to_save`) or only
kept (`save_embedding_layers`), and a LoRA on the embeddings. Rows of the embeddings that differ from the backbone's
come in as trainable tokens.

Without `modules_to_save` PEFT loads a table into the model itself, so that one of a tied pair is both.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, sized
from polygraft.grafts.formats.patterns import Patterns
from polygraft.grafts.formats.peft_keys import ROOT
from polygraft.grafts.formats.peft_modules import path, values_at
from polygraft.grafts.grammar import Term
from polygraft.grafts.methods.configs import names
from polygraft.grafts.methods.exchange import Config, Peft
from polygraft.grafts.sites import EMBED_SITE, ModelShape, Site

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]
_HEADS = ("lm_head", "embed_out")
_TABLES = ("weight", "base_layer.weight", "modules_to_save.weight")
_MERGE = "fold the folder into its model (PEFT's merge_and_unload) and serve that as a backbone"


def of_layers(config: Config, shape: ModelShape) -> Config:
    """The config without the embeddings and the head among its `modules_to_save`."""
    saved = names(config, "modules_to_save")
    modules = (_embedding(shape), *_HEADS)
    return {**config, "modules_to_save": [name for name in saved if not any(_is(one, name) for one in modules)]}


def read(
    layout: Peft, config: Config, stored: Values, shape: ModelShape, backbone_files: BackboneFiles | None
) -> tuple[Term | None, Tensor | None, set[str]]:
    """The edit of the embeddings, its rows, and the keys that all of it is read from.

    Raises FormatError for a head that is not the backbone's, a table of another vocabulary, and one that is missing.
    """
    embedding = _embedding(shape)
    fronts = tuple(f"{ROOT}{module}." for module in (embedding, *_HEADS))
    keys = {key for key in stored if key.startswith(fronts) and ".token_adapter." not in key}
    saved = [name for name in names(config, "modules_to_save") if any(_is(m, name) for m in (embedding, *_HEADS))]
    if not keys and not saved:
        return None, None, set()
    if backbone_files is None:
        raise FormatError("modules_to_save: embeddings are kept whole in PEFT's files; name the backbone's folder")
    head = next((module for module in _HEADS if f"{module}.weight" in backbone_files.files), _HEADS[0])
    own = backbone_files.wide(f"{embedding}.weight")
    tables = {module: _table(module, stored, saved, own) for module in (embedding, head)}
    of_its_own = {module: any(_is(module, name) for name in saved) for module in tables}
    both = [table for module, table in tables.items() if table is not None and not of_its_own[module]]
    if backbone_files.tied and both:
        if any(not both[0].equal(one) for one in both):
            raise FormatError(f"{head}.weight: is tied to the embeddings, and the file has another for each")
        tables = {module: table if of_its_own[module] else both[0] for module, table in tables.items()}
    trained, heads = tables[embedding], tables[head]
    if heads is not None and not heads.equal(own if backbone_files.tied else backbone_files.wide(f"{head}.weight")):
        raise FormatError(f"{head}.weight: is not the backbone's, and no op of ours changes a head; {_MERGE}")
    if lora := [key for key in sorted(keys) if key.startswith(f"{ROOT}{head}.lora_")]:
        raise FormatError(f"{lora[0]}: no op of ours changes a head; {_MERGE}")
    rows = own if trained is None else trained
    change = _low_rank(layout, config, stored, embedding, own)
    rows = rows if change is None else rows + change
    read_from = {
        f"{ROOT}{module}.{end}" for module in tables for end in (*_TABLES, "lora_embedding_A", "lora_embedding_B")
    }
    ids = (rows != own).any(1).nonzero().flatten()
    if not len(ids):
        return None, None, keys & read_from
    return Term("trainable-tokens", {"ids": _ranges(ids.tolist())}), rows[ids].float(), keys & read_from


def _table(module: str, stored: Values, saved: list[str], own: Tensor) -> Tensor | None:
    """The module's, float32 or wider; None where the file has none and need not."""
    key = next((key for end in _TABLES if (key := f"{ROOT}{module}.{end}") in stored), None)
    if key is None:
        if any(_is(module, name) for name in saved):
            raise FormatError(f"{ROOT}{module}.weight: is missing")
        return None
    value = stored[key]
    if value.ndim == 2 and len(value) != len(own):
        raise FormatError(
            f"{key}: {len(value)} tokens, and the backbone has {len(own)}: a vocabulary resized; {_MERGE}"
        )
    return sized(key, value, tuple(own.shape)).to(own.dtype)


def _low_rank(layout: Peft, config: Config, stored: Values, module: str, own: Tensor) -> Tensor | None:
    """s (B A)^T of a LoRA on the embeddings, with A [r, vocabulary] and B [hidden, r]."""
    keys = [f"{ROOT}{module}.lora_embedding_{part}" for part in "AB"]
    if not all(key in stored for key in keys):
        return None
    if layout.method not in ("lora", "rslora"):
        raise FormatError(f"{keys[0]}: {layout.method} of the embeddings is not read; {_MERGE}")
    said = {"r": 8, "lora_alpha": 8, **config, **dict(values_at(layout, config, module, Patterns()))}
    r, alpha = said["r"], said["lora_alpha"]
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        raise FormatError(f"r, lora_alpha: {r!r}, {alpha!r} are not those of a LoRA")
    A, B = (stored[key].to(own.dtype) for key in keys)
    sized(keys[0], A, (r, len(own))), sized(keys[1], B, (own.shape[1], r))
    return alpha / (sqrt(r) if layout.method == "rslora" else r) * (A.T @ B.T)


def _ranges(ids: list[int]) -> str:
    """As `ids` of trainable tokens: 3-7|9."""
    found: list[list[int]] = []
    for id in ids:
        if found and found[-1][1] == id - 1:
            found[-1][1] = id
        else:
            found.append([id, id])
    return "|".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _embedding(shape: ModelShape) -> str:
    return path(Site(0, EMBED_SITE), shape)


def _is(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")

"""Rows of the input embeddings that are edited in addition to a method, PEFT's `trainable_token_indices`: one table of
modules and their tokens for both ways.

PEFT edits a head that is tied to the embeddings with them, but for a config that names both with other tokens for each.
So where they are tied, the config of edits in the input alone names the head with one token, whose row stays the
backbone's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, sized
from polygraft.grafts.formats.peft_modules import path
from polygraft.grafts.grammar import Term
from polygraft.grafts.methods.exchange import TOKENS_FIELD, Config
from polygraft.grafts.sites import EMBED_SITE, Site
from polygraft.grafts.spec import Slot, SpecError, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]
Table = Mapping[str, tuple[int, ...]]  # tokens whose rows PEFT replaces, by the module's path
EMBED = Site(0, EMBED_SITE)
METHOD = "trainable-tokens"
_HEAD = "lm_head"


def edits(slot: Slot) -> TypeGuard[Tokens]:
    """Whether the slot is what trainable tokens are, whichever they are."""
    if not isinstance(slot, Tokens) or slot.mode != "replace":
        return False
    return slot == Tokens(length=slot.length, mode="replace", ids=slot.ids)


def term(config: Config, backbone_files: BackboneFiles | None) -> Term | None:
    """The term to add to the method's graft, None where a config edits no rows.

    Raises SpecError for modules that are not the input embeddings, FormatError where PEFT's edits are others than ours.
    """
    if not config.get(TOKENS_FIELD):
        return None
    backbone_files = _needed(backbone_files)
    try:
        table = _table(config, backbone_files)
    except FormatError as error:
        raise FormatError(f"{error} (got {str(config[TOKENS_FIELD])[:200]})") from None
    return Term(METHOD, {"ids": "|".join(map(str, table[_embedding(backbone_files)]))})


def read(config: Config, stored: Values, backbone_files: BackboneFiles | None) -> tuple[Tensor, set[str]]:
    """The rows of that term, and the keys that they are read from; raises FormatError for a head that is not the
    backbone's."""
    backbone_files = _needed(backbone_files)
    table = _table(config, backbone_files)
    embedding, keys = _embedding(backbone_files), {module: _key(module) for module in table}
    if missing := [key for key in keys.values() if key not in stored]:
        raise FormatError(f"{missing[0]}: is missing")
    rows = {m: sized(keys[m], stored[keys[m]], (len(ids), backbone_files.shape.hidden)) for m, ids in table.items()}
    for module in table.keys() - {embedding}:
        own = _own(table[module], backbone_files)
        if not rows[module].to(own.dtype).equal(own):
            raise FormatError(f"{keys[module]}: is not the backbone's, and no op of ours edits a head")
    return rows[embedding].float(), {*keys.values()}


def write(
    slot: Tokens, rows: Tensor | None, backbone_files: BackboneFiles | None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The field of the config and tensors (none without `rows`); raises FormatError where none mean just the edits."""
    backbone_files = _needed(backbone_files)
    other = (0,) if slot.ids != (0,) else (1,)
    table = {_embedding(backbone_files): slot.ids} | ({_HEAD: other} if backbone_files.tied else {})
    _check(table, backbone_files)
    said = {module: [*ids] for module, ids in table.items()}
    fields: dict[str, object] = {TOKENS_FIELD: said if len(said) > 1 else [*slot.ids]}
    if rows is None:
        return fields, {}
    made = {m: rows if m == _embedding(backbone_files) else _own(ids, backbone_files) for m, ids in table.items()}
    return fields, {_key(module): value.detach().float().contiguous().clone() for module, value in made.items()}


def _needed(backbone_files: BackboneFiles | None) -> BackboneFiles:
    if backbone_files is None:
        raise FormatError(f"{TOKENS_FIELD}: PEFT may edit the head, too; name the backbone's folder")
    return backbone_files


def _embedding(backbone_files: BackboneFiles) -> str:
    return path(EMBED, backbone_files.shape)


def _key(module: str) -> str:
    return f"base_model.model.{module}.token_adapter.trainable_tokens_delta"


def _own(ids: tuple[int, ...], backbone_files: BackboneFiles) -> Tensor:
    """Rows of the embeddings, which are those of the head that is tied to them."""
    table = backbone_files.wide(f"{_embedding(backbone_files)}.weight")
    if max(ids) >= len(table):
        raise FormatError(f"{TOKENS_FIELD}: {max(ids)} is not a token of this backbone; it has {len(table)}")
    return table[[*ids]]


def _table(config: Config, backbone_files: BackboneFiles) -> Table:
    table = _said(config[TOKENS_FIELD], backbone_files)
    _check(table, backbone_files)
    return table


def _said(given: object, backbone_files: BackboneFiles) -> Table:
    """What the field means: tokens of the input embeddings, or of modules named by the ends of their paths."""
    embedding = _embedding(backbone_files)
    known = (embedding, _HEAD) if backbone_files.tied else (embedding,)
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in (given if isinstance(given, Mapping) else {embedding: given}).items():
        module = next((one for one in known if f".{one}".endswith(f".{name}")), None)
        if module is None or module in found:
            raise SpecError(f"{TOKENS_FIELD}: {name!r} is not {embedding!r}, and no op edits rows elsewhere")
        if not isinstance(ids, list) or not ids or not all(type(id) is int and id >= 0 for id in ids):
            raise SpecError(f"{TOKENS_FIELD}: {str(ids)[:200]} is not a list of tokens")
        found[module] = tuple(ids)
    if embedding not in found:
        raise SpecError(f"{TOKENS_FIELD}: names no tokens of {embedding!r}, and no op edits rows elsewhere")
    return found


def _check(table: Table, backbone_files: BackboneFiles) -> None:
    """Raise FormatError where PEFT's model with such edits is another than ours."""
    ids, head = table[_embedding(backbone_files)], table.get(_HEAD)
    if backbone_files.shape.encoder_layers:
        raise FormatError(
            f"{TOKENS_FIELD}: both stacks of {backbone_files.shape.arch} read what PEFT edits for neither"
        )
    if backbone_files.tied and (head is None or head == ids or not backbone_files.shape.causal):
        raise FormatError(f"{TOKENS_FIELD}: PEFT edits the head tied to the embeddings, too; no op of ours does")
    if head is not None and f"{_HEAD}.bias" in backbone_files.files:
        raise FormatError(f"{TOKENS_FIELD}: PEFT computes a head that it edits without its bias")

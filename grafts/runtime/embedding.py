"""The input embeddings of a forward's rows, with the rows that grafts have there of their own.

A negative id -1 - i is a virtual token: row i of its graft's prompt. It is a row as others are, with a position, keys
and values of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.generated import generate
from polygraft.grafts.runtime.keys import TokensKey
from polygraft.grafts.runtime.route import RouteTable, Rows
from polygraft.grafts.runtime.stack import Stack, StackSlice
from polygraft.grafts.sites import EMBED_SITE, Site
from polygraft.grafts.spec import GraftSpec, Tokens
from polygraft.kernels.tokens.op import tokens


def embed(rows: Rows, embedding_VD: Tensor, factor: Tensor | None, route: RouteTable) -> Tensor:
    """[T, D]; a virtual token of no graft has the embedding of token 0. `factor` scales the rows of tokens, edited ones
    too (Gemma)."""
    ids_T, positions_T = rows.ids, rows.positions
    x = F.embedding(ids_T.clamp_min(0), embedding_VD) if rows.inputs_embeds is None else rows.inputs_embeds.detach()
    if factor is not None:
        x = x * factor.to(x.dtype)
    bare = x.detach()
    if route.stacks.trainable and torch.is_grad_enabled():
        x.requires_grad_()
    for key, stack in route.stacks.of_kind(Site(0, EMBED_SITE), TokensKey):
        if (key.gate != "none" or key.mode == "add") and route.source is not None:
            continue  # where an encoder reads the prompt, it is its rows that are edited or made
        if key.gate != "none":
            x = tokens(x, *generate(stack, rows, bare, route), add=False)
            continue
        index = _index(key.mode, stack, ids_T, positions_T, route)
        own = stack.parts["p"]
        own = own * factor.to(own.dtype) if factor is not None and key.mode == "replace" else own
        x = tokens(x, own, index, key.mode == "add")
    return x


def virtual_ids(count: int) -> list[int]:
    """The ids of a graft's `count` virtual tokens."""
    return [-1 - i for i in range(count)]


def _index(mode: str, stack: Stack, ids_T: Tensor, positions_T: Tensor, route: RouteTable) -> Tensor:
    """Stack row of every batch row, -1 where none."""
    index = torch.full_like(ids_T, -1)
    for span in route.spans:
        for own in stack.slices:
            if own.graft == span.graft:
                rows = slice(span.start, span.stop)
                spec = route.stacks.residents[own.graft].spec
                if mode == "replace":
                    index[rows] = _edited(own, spec, ids_T[rows], route)
                else:
                    index[rows] = _places(mode, own, spec, ids_T[rows], positions_T[rows])
    return index


def _places(mode: str, own: StackSlice, spec: GraftSpec, ids: Tensor, positions: Tensor) -> Tensor:
    if mode == "before":
        return torch.where(ids < 0, own.first - 1 - ids, -1)
    at = positions - spec.context_length  # of the prompt's own tokens
    return torch.where((at >= 0) & (at < own.last - own.first), own.first + at, -1)


def _edited(own: StackSlice, spec: GraftSpec, ids: Tensor, route: RouteTable) -> Tensor:
    """Where the ids' rows are edited; a graft may edit all of a vocabulary."""

    def ordered() -> tuple[Tensor, Tensor]:
        edited = next(slot.ids for slot in spec.slots if isinstance(slot, Tokens) and slot.mode == "replace")
        found, order = torch.tensor(edited, device=ids.device).sort()
        return found, order

    found, order = route.stacks.derived((_edited, own.graft), ordered)
    at = torch.searchsorted(found, ids.contiguous()).clamp_max(len(found) - 1)
    return torch.where(found[at] == ids, own.first + order[at], -1)

"""The input embeddings of a forward's rows, with the rows that grafts have there of their own.

A negative id -1 - i is a virtual token: row i of its graft's prompt. It is a row as others are, with a position, keys
and values of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.generated import generate
from polygraft.grafts.runtime.route import RouteTable, Rows
from polygraft.grafts.runtime.stacks import Entry, Stack
from polygraft.grafts.sites import EMBED_SITE, Site
from polygraft.grafts.spec import GraftSpec, Tokens
from polygraft.kernels.tokens.op import tokens


def embed(rows: Rows, embedding_VD: Tensor, factor: Tensor | None, route: RouteTable) -> Tensor:
    """[T, D]; a virtual token of no graft has the embedding of token 0. `factor` scales the rows of tokens, edited ones
    too (Gemma)."""
    ids_T, positions_T = rows.ids, rows.positions
    x = F.embedding(ids_T.clamp_min(0), embedding_VD) if rows.given is None else rows.given.detach()
    if factor is not None:
        x = x * factor.to(x.dtype)
    bare = x.detach()
    if route.stacks.trainable and torch.is_grad_enabled():
        x.requires_grad_()
    for kind, stack in route.stacks.get(Site(0, EMBED_SITE)).items():
        gated = kind.variant.startswith("gated.")
        if (gated or kind.variant == "add") and route.source is not None:
            continue  # where an encoder reads the prompt, it is its rows that are edited or made
        if gated:
            x = tokens(x, *generate(stack, rows, bare, route), add=False)
            continue
        index = _index(kind.variant, stack, ids_T, positions_T, route)
        own = stack.parts["p"]
        own = own * factor.to(own.dtype) if factor is not None and kind.variant == "replace" else own
        x = tokens(x, own, index, kind.variant == "add")
    return x


def virtual_ids(count: int) -> list[int]:
    """The ids of a graft's `count` virtual tokens."""
    return [-1 - i for i in range(count)]


def _index(mode: str, stack: Stack, ids_T: Tensor, positions_T: Tensor, route: RouteTable) -> Tensor:
    """Stack row of every batch row, -1 where none."""
    index = torch.full_like(ids_T, -1)
    for span in route.spans:
        for entry in stack.entries:
            if entry.graft == span.graft:
                rows = slice(span.start, span.stop)
                spec = route.stacks.residents[entry.graft].spec
                index[rows] = _places(mode, entry, spec, ids_T[rows], positions_T[rows])
    return index


def _places(mode: str, entry: Entry, spec: GraftSpec, ids: Tensor, positions: Tensor) -> Tensor:
    if mode == "before":
        return torch.where(ids < 0, entry.first - 1 - ids, -1)
    if mode == "add":
        at = positions - spec.context_length  # of the prompt's own tokens
        return torch.where((at >= 0) & (at < entry.last - entry.first), entry.first + at, -1)
    edited = next(slot.ids for slot in spec.slots if isinstance(slot, Tokens) and slot.mode == "replace")
    equal = ids.unsqueeze(1) == torch.tensor(edited, device=ids.device)
    return torch.where(equal.any(1), entry.first + equal.int().argmax(1), -1)

"""Prompts that are made of what follows them: sum_j w_j P_j with weights that read the mean of the input's embeddings
(`spec.Tokens` with a gate).

Every sequence is computed alone, in float32 or wider and over its own rows, so that its prompt does not depend on who
is beside it. The mean is of the backbone's own embeddings: no gradient passes through it, and edits of the same graft
are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.grafts.runtime.keys import TokensKey
from polygraft.grafts.runtime.route import RouteTable, Rows, Span
from polygraft.grafts.runtime.stack import Stack
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.sites import EMBED_SITE, Site
from polygraft.grafts.spec import GraftSpec, SpecError, Tokens
from polygraft.kernels.common.dropout import combine
from polygraft.kernels.common.noise import normal

_ROUTER = -3  # the noise's key, among those that sites have for dropout


def check_inputs(rows: Rows, stacks: Stacks) -> None:
    """Raise SpecError unless `rows` say where each prompt is that virtual tokens will be made of: those of the source
    where there is one, since an encoder reads the prompts. Asked before the rows move to a device, which would have to
    be waited for."""
    rows = rows if rows.source is None else rows.source
    stacked = stacks.of_kind(Site(0, EMBED_SITE), TokensKey)
    grafts = {own.graft for key, stack in stacked if key.gate != "none" for own in stack.slices}
    for span in rows.spans:
        if span.graft in grafts:
            inputs = len(_inputs(span, rows))
            if int((rows.ids[span.start : span.stop] == -1).sum()) != inputs:
                where = f"rows {span.start}-{span.stop - 1}"
                raise SpecError(f"inputs: {inputs} in {where}; give one for each prompt that begins there")


def generate(stack: Stack, rows: Rows, bare_TD: Tensor, route: RouteTable) -> tuple[Tensor, Tensor]:
    """The prompts [P, D] of all sequences that begin here, one after the other, and the row of them for every batch
    row [T], -1 where none. `bare` are the embeddings of the rows."""
    slots = {own.graft: _slot(route.stacks.residents[own.graft].spec) for own in stack.slices}
    held = {
        part: dict(zip(slots, value.split_with_sizes([_height(part, slot) for slot in slots.values()]), strict=True))
        for part, value in stack.parts.items()
    }
    index = torch.full_like(rows.ids, -1)
    made = [stack.parts["p"][:0]]
    for span in route.spans:
        if (slot := slots.get(span.graft)) is None:
            continue
        inputs = _inputs(span, rows)
        if not inputs:
            continue
        # Copied, so that where a graft's rows lie in a stack cannot decide how a product of them is rounded.
        parts = {part: values[span.graft].clone() for part, values in held.items()}
        for start, stop in inputs:
            first = start - slot.length
            index[first:start] = sum(map(len, made)) + torch.arange(slot.length, device=index.device)
            mean = bare_TD[start:stop].to(parts["p"].dtype, copy=True).mean(0)
            key = None if route.dropout_keys is None else route.dropout_keys[first]
            made.append(_prompt(slot, parts, mean, key))
    return torch.cat(made), index


def _prompt(slot: Tokens, parts: Mapping[str, Tensor], mean_D: Tensor, key: Tensor | None) -> Tensor:
    """One sequence's [length, D]; `key` hashes its place in a job, None where nothing is drawn."""
    prompts = parts["p"].view(slot.experts, slot.length, -1)
    scores = parts["G"] @ mean_D
    if slot.gate == "relu":
        weights = (scores + parts["a"].squeeze(1)).relu()
        return (weights @ prompts.flatten(1)).view_as(parts["c"]) + parts["c"]
    if slot.noise and key is not None:
        z = normal(combine(key, _ROUTER), slot.experts, scores.dtype)
        scores = scores * (1 + slot.noise * z)
    shares = scores.softmax(0)
    chosen = shares.argmax(0, keepdim=True)  # a tensor, so that nobody waits for the device
    return shares.index_select(0, chosen)[0] * prompts.index_select(0, chosen)[0]


def _inputs(span: Span, rows: Rows) -> list[tuple[int, int]]:
    return [(one.start, one.stop) for one in rows.inputs if span.start <= one.start < span.stop]


def _slot(spec: GraftSpec) -> Tokens:
    return next(slot for slot in spec.slots if isinstance(slot, Tokens) and slot.gate != "none")


def _height(part: str, slot: Tokens) -> int:
    """Rows of a part in its stack."""
    return {"p": slot.experts * slot.length, "c": slot.length}.get(part, slot.experts)

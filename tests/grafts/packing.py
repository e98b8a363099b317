"""Sequences of several grafts in one batch, to be compared with an oracle's one by one: tokens, images, or pairs of a
source and a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoConfig

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Input, Rows
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.spec import GraftSpec
from polygraft.launch.demo.oracle.plain import image, source

PROMPT = 5  # rows at the head of every sequence that are its prompt


def packed(
    backbone: Backbone,
    grafts: Sequence[tuple[int | None, GraftSpec | None]],
    prompts: Sequence[Sequence[Tensor]],
    sources: Sequence[Sequence[Tensor]] | None = None,
) -> tuple[Rows, WholeSequences, list[Tensor]]:
    """Each graft's prompts under it (its number and spec, None for the bare backbone), after sources where an encoder
    reads: rows, attention, and the rows of each sequence that have logits, an image's one."""
    shape, read = backbone.shape, RowBuilder()
    batch = RowBuilder(read if shape.encoder_layers else None)
    rows: list[range] = []
    sources = sources or [[source(prompt) for prompt in own] for own in prompts]
    for (graft, spec), own, before_own in zip(grafts, prompts, sources, strict=True):
        prefix, virtual = (spec.prefix_length, spec.virtual_length) if spec is not None else (0, 0)
        for prompt, first in zip(own, before_own, strict=True):
            tokens: Sequence[int] | Tensor = prompt.tolist()
            if shape.images:
                pixels = image(AutoConfig.from_pretrained(backbone.folder), prompt)
                (tokens,) = backbone.patches(pixels[None])
            if shape.encoder_layers:
                _add(read, first.tolist(), graft, prefix, virtual)
            rows.append(_add(batch, tokens, graft, prefix, 0 if shape.encoder_layers else virtual))
    answers = [torch.arange(own.start, own.stop) for own in rows]
    return batch.rows(), batch.attention(shape), [own[:1] for own in answers] if shape.images else answers


def _add(builder: RowBuilder, tokens: Sequence[int] | Tensor, graft: int | None, prefix: int, virtual: int) -> range:
    prompt = Input(0, min(PROMPT, len(tokens)))
    return builder.add(tokens, graft=graft, position=prefix, virtual=virtual, prompt=prompt)


def assert_same_bits_in_company(
    gradients: Callable[[tuple[int, ...]], list[list[Tensor]]], texts: Sequence[str]
) -> None:
    """`gradients` gives those of every job of a pack; the jobs are numbered as their `texts`."""
    together = gradients(tuple(range(len(texts))))
    for job, text in enumerate(texts):
        (own,) = gradients((job,))
        assert len(own) and all(torch.equal(a, b) for a, b in zip(own, together[job], strict=True)), text

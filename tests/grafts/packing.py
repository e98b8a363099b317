"""Sequences of several grafts in one batch, to be compared with an oracle's one by one: tokens, images, or pairs of a
source and a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.spec import GraftSpec
from polygraft.launch.demo.oracle.plain import image, source

PROMPT = 5  # rows at the head of every sequence that are its prompt


@dataclass
class Batch:
    """Rows as they come; `own` are the places of those that are not virtual, sequence by sequence, `inputs` the rows of
    the prompts."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    sequences: list[tuple[int, int]] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)

    def add(
        self, ids: Tensor, graft: int | None, prefix: int = 0, virtual: int = 0, given: Tensor | None = None
    ) -> None:
        start, count = sum(map(len, self.ids)), virtual + len(ids)
        self.sequences.append((start, count))
        self.ids.append(torch.cat([torch.tensor(virtual_ids(virtual), dtype=torch.long), ids]))
        self.positions.append(torch.arange(count) + prefix)
        self.own.append(torch.arange(start + virtual, start + count))
        self.inputs.append(Input(start + virtual, start + min(virtual + PROMPT, count)))
        if given is not None:
            self.given.append(F.pad(given, (0, 0, virtual, 0)))
        if graft is not None:
            self.spans.append(Span(start, start + count, graft))

    def rows(self, before: Rows | None = None) -> Rows:
        given = torch.cat(self.given) if self.given else None
        ids, positions = torch.cat(self.ids), torch.cat(self.positions)
        return Rows(ids, positions, tuple(self.spans), inputs_embeds=given, source=before, inputs=tuple(self.inputs))


def packed(
    backbone: Backbone,
    grafts: Sequence[tuple[int | None, GraftSpec | None]],
    prompts: Sequence[Sequence[Tensor]],
    sources: Sequence[Sequence[Tensor]] | None = None,
) -> tuple[Rows, WholeSequences, list[Tensor]]:
    """Each graft's prompts under it (its number and spec, None for the bare backbone), after sources where an encoder
    reads: rows, attention, and the rows of each sequence that have logits, an image's one."""
    shape, read, batch = backbone.shape, Batch(), Batch()
    sources = sources or [[source(prompt) for prompt in own] for own in prompts]
    for (graft, spec), own, before_own in zip(grafts, prompts, sources, strict=True):
        before = (spec.prefix_length, spec.virtual_length) if spec is not None else (0, 0)
        for prompt, first in zip(own, before_own, strict=True):
            if shape.images:
                pixels = image(AutoConfig.from_pretrained(backbone.folder), prompt)
                (patches,) = backbone.patches(pixels[None])
                batch.add(torch.zeros(len(patches), dtype=torch.long), graft, *before, patches)
            elif shape.encoder_layers:
                read.add(first, graft, *before)
                batch.add(prompt, graft, before[0])
            else:
                batch.add(prompt, graft, *before)
    attention = WholeSequences(tuple(batch.sequences), shape, tuple(read.sequences))
    answers = [own[:1] for own in batch.own] if shape.images else batch.own
    return batch.rows(read.rows() if read.ids else None), attention, answers


def assert_same_bits_in_company(
    gradients: Callable[[tuple[int, ...]], list[list[Tensor]]], texts: Sequence[str]
) -> None:
    """`gradients` gives those of every job of a pack; the jobs are numbered as their `texts`."""
    together = gradients(tuple(range(len(texts))))
    for job, text in enumerate(texts):
        (own,) = gradients((job,))
        assert len(own) and all(torch.equal(a, b) for a, b in zip(own, together[job], strict=True)), text

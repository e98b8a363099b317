"""A classifier on top of a backbone: which labels it tells apart, and what it computes them from. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

HeadKind = Literal["linear", "pooled", "dense"]


@dataclass(frozen=True, slots=True)
class Head:
    """Logits of `labels`, in their order, from the hidden state h [hidden] of one token of a text, after the last norm.

    `linear`, on decoders: W h of the last token (transformers' `score`). `pooled`, on BERT: W tanh(P h + p) + b of the
    first one, with P and p the backbone's own pooler, which stays as it is. `dense`, on RoBERTa: W tanh(D h + d) + b of
    the first one, all trained. W starts as transformers', normal with a deviation of 0.02, D too, b and d at 0. There
    is no dropout here, which transformers' classes put before BERT's and RoBERTa's when their configs say so.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    labels: tuple[str, ...]
    kind: HeadKind = "linear"

    @property
    def reads_last(self) -> bool:
        """Whether the last token is read, else the first one."""
        return self.kind == "linear"

    def parts(self, hidden: int) -> Mapping[str, tuple[tuple[int, ...], str, bool]]:
        """Shape, start and whether it is trained, of each tensor by the name that follows `head.`."""
        classes, pooled = len(self.labels), self.kind == "pooled"
        weight = {"weight": ((classes, hidden), "normal", True)}
        if self.kind == "linear":
            return weight
        dense: dict[str, tuple[tuple[int, ...], str, bool]] = {
            "dense.weight": ((hidden, hidden), "pooler" if pooled else "normal", not pooled),
            "dense.bias": ((hidden,), "pooler" if pooled else "zero", not pooled),
        }
        return {**dense, **weight, "bias": ((classes,), "zero", True)}

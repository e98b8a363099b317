"""The labels of texts that a step has read to their ends."""

from __future__ import annotations

from torch import Tensor

from polygraft.grafts.runtime.classifier import label_logits
from polygraft.serving.batch import Batch

Probabilities = tuple[float, ...]


def probabilities(hidden_TD: Tensor, batch: Batch) -> list[Probabilities | None]:
    """Of the labels of each of `batch.classified`, in their graft's order; None where they are not finite. Text by
    text, so that none depends on who shares the step."""
    found: list[Probabilities | None] = []
    for sequence, row in zip(batch.classified, batch.ends, strict=True):
        resident = next(one for one in batch.stacks.residents if one.id == sequence.request.graft)
        parts = {tensor.part: resident.tensors[tensor.name] for tensor in resident.graft.head}
        told = label_logits(parts, hidden_TD[row : row + 1]).softmax(dim=1)[0]
        found.append(tuple(told.tolist()) if bool(told.isfinite().all()) else None)
    return found

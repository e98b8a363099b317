"""Which classifier a file of labelled texts asks for."""

from __future__ import annotations

from pathlib import Path

from polygraft.grafts.head import Head
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.jsonl import DataError, read_labelled_texts
from polygraft.grafts.text.labelled import Labelled, LabelledError, labels_of


def head_over(training_file: Path, shape: ModelShape) -> Head:
    """The head of a backbone of this shape over the labels of a training file. Raises DataError naming the line,
    SpecError for a backbone that classifies no texts, OSError."""
    if shape.head_kind is None:
        raise SpecError(f"head: {shape.arch} classifies no texts here")
    try:
        return Head(labels_of(read_labelled_texts(training_file)), shape.head_kind)
    except LabelledError as error:
        raise DataError(0, str(error)) from None


def label_of(head: Head, example: Labelled) -> int:
    """The number of its label. Raises DataError for one that the head does not have, and for a pair that BERT, whose
    embeddings say which of two texts a token is of, would read as one text."""
    if example.label not in head.labels:
        raise DataError(example.line, f"label: {example.label[:60]!r} is not one of the training file")
    if example.second is not None and head.kind == "pooled":
        why = "BERT marks which of two texts a token is of, which is not done here; make one text of both"
        raise DataError(example.line, f"sentence2: {why}")
    return head.labels.index(example.label)

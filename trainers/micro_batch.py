"""What one job brings to a packed forward."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.trainers.head import ClassHead
from polygraft.trainers.job import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One job's part of a forward: samples (with their numbers, for dropout) through resident `graft`.

    `normaliser` is the loss weight of the job's whole global batch; `key` hashes (job seed, step), None where
    nothing is drawn. Every sequence begins with `virtual_length` virtual tokens. A job that classifies has a `head`,
    and its samples labels.
    """

    graft: int
    prefix_length: int
    samples: tuple[Sample, ...]
    numbers: tuple[int, ...]
    normaliser: float
    key: int | None = None
    virtual_length: int = 0
    head: ClassHead | None = None

    @property
    def rows(self) -> int:
        return self.tokens + self.virtual_length * len(self.samples)

    @property
    def tokens(self) -> int:
        """The samples' own: virtual ones are nobody's text."""
        return sum(sample.rows for sample in self.samples)

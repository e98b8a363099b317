"""Awkward batches of segments, and the tensors of the branch op for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.compare import Results


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of `rows` against a stack of `stack_rows`, with features that fill no tile."""

    rows: int
    stack_rows: int
    items: tuple[Segment, ...]
    d_in: int = 33
    d_out: int = 47

    @property
    def segments(self) -> Segments:
        return Segments(self.items)


CASES = {
    "one row": Case(1, 1, (Segment(0, 1, 0, 1, 0.5),)),
    "63 rows, odd rank": Case(63, 7, (Segment(0, 63, 0, 7),)),
    "65 rows, rank 65": Case(65, 65, (Segment(0, 65, 0, 65, 2.0),)),
    "mixed ranks": Case(
        70, 27, (Segment(0, 1, 0, 5, 0.7), Segment(1, 3, 5, 6), Segment(3, 67, 6, 23, 1.3), Segment(67, 70, 23, 27))
    ),
    "equal shapes, one factor": Case(12, 9, tuple(Segment(4 * i, 4 * i + 4, 3 * i, 3 * i + 3, 2.0) for i in range(3))),
    "equal shapes, many factors": Case(
        12, 9, tuple(Segment(4 * i, 4 * i + 4, 3 * i, 3 * i + 3, i / 3) for i in range(3))
    ),
    "one-row segments": Case(9, 18, tuple(Segment(i, i + 1, 2 * i, 2 * i + 2, 1 / (i + 1)) for i in range(9))),
    "empty segments": Case(
        8,
        6,
        (Segment(0, 0, 0, 2), Segment(0, 5, 2, 2), Segment(0, 5, 2, 5, 0.9), Segment(8, 8, 5, 6), Segment(5, 8, 0, 2)),
    ),
    "uncovered rows and ranks": Case(20, 12, (Segment(3, 7, 2, 5), Segment(11, 17, 8, 11, 0.4))),
    "unsorted": Case(20, 12, (Segment(11, 17, 8, 11, 0.4), Segment(17, 20, 0, 3), Segment(3, 7, 3, 5))),
    "overlapping rows": Case(20, 12, (Segment(0, 12, 0, 4), Segment(5, 20, 4, 9, 0.3), Segment(5, 12, 9, 12, 1.7))),
    "overlapping ranks": Case(20, 6, (Segment(0, 7, 0, 4), Segment(7, 14, 2, 6, 0.3), Segment(14, 20, 0, 4, 1.7))),
    "the same twice": Case(6, 3, (Segment(0, 6, 0, 3, 0.5), Segment(0, 6, 0, 3, 0.25))),
    "nothing": Case(4, 3, ()),
}


def branch_inputs(
    case: Case, dtype: torch.dtype, seed: int = 0, *, biased: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """(x, y, A, B and with `biased` a by name, an upstream gradient), of size one on every output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(case.rows, case.d_in),
        "y": normal(case.rows, case.d_out),
        "A": normal(case.stack_rows, case.d_in) / case.d_in**0.5,
        "B": normal(case.stack_rows, case.d_out),
    }
    upstream = normal(case.rows, case.d_out).to(dtype)
    if biased:
        inputs["a"] = normal(case.stack_rows, 1)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}, upstream


class Joined:
    """The segment of a case with foreign ones of (rows, rank, factor) before and after it, in batch and stack."""

    def __init__(
        self,
        own: Case,
        before: list[tuple[int, int, float]],
        after: list[tuple[int, int, float]],
        dtype: torch.dtype,
        *,
        biased: bool = False,
    ) -> None:
        items: list[Segment] = []
        start = first = 0
        for rows, rank, scale in (*before, (own.rows, own.stack_rows, own.items[0].scale), *after):
            items.append(Segment(start, start + rows, first, first + rank, scale))
            start, first = start + rows, first + rank
        self.segments = Segments(tuple(items))
        placed = items[len(before)]
        self.batch, self.stack = slice(placed.start, placed.stop), slice(placed.first, placed.last)
        others = Case(start, first, (), own.d_in, own.d_out)
        self.inputs, self.upstream = branch_inputs(others, dtype, seed=1, biased=biased)
        inputs, upstream = branch_inputs(own, dtype, biased=biased)
        for name, tensor in inputs.items():
            self.inputs[name][self._place(name)] = tensor
        self.upstream[self.batch] = upstream

    def fill_others(self, value: float, *names: str) -> None:
        """Set the foreign rows of the named tensors (an input or `upstream`; all of them by default) to a value."""
        for name, tensor in {**self.inputs, "upstream": self.upstream}.items():
            if not names or name in names:
                own = tensor[self._place(name)].clone()
                tensor[:] = value
                tensor[self._place(name)] = own

    def own(self, results: Results) -> Results:
        """The segment's share of the results."""
        return {name: tensor[self._place(name)] for name, tensor in results.items()}

    def _place(self, name: str) -> slice:
        return self.stack if name.removeprefix("d.") in ("A", "B", "a") else self.batch

"""Work of the branch op, and which of its two CPU forms is cheaper. Torch-free."""

from collections.abc import Iterable

# What the two forms cost before they multiply anything, at 200 GFLOP/s: a run's batched pair of products about 100 us,
# the stack's pair of plain ones about 50 us (docs/log.md).
RUN_FLOPS, STACK_FLOPS = 20_000_000, 10_000_000


def flops(rows_and_ranks: Iterable[tuple[int, int]], d_in: int, d_out: int) -> int:
    """Multiply-adds x 2 of the forward over segments of (rows, rank)."""
    return sum(2 * rows * rank * (d_in + d_out) for rows, rank in rows_and_ranks)


def bytes_moved(rows_and_ranks: Iterable[tuple[int, int]], d_in: int, d_out: int, *, itemsize: int) -> int:
    """Bytes read and written by the forward when every segment's weights and rows are touched once."""
    return sum(itemsize * ((rows + rank) * (d_in + d_out) + 2 * rows * rank) for rows, rank in rows_and_ranks)


def bias_flops(rows_and_ranks: Iterable[tuple[int, int]]) -> int:
    """Adds of the hidden biases' gradient, the sums of every segment's columns."""
    return sum(rows * rank for rows, rank in rows_and_ranks)


def bias_bytes(rows_and_ranks: Iterable[tuple[int, int]], *, itemsize: int) -> int:
    """Bytes read and written by the hidden biases' gradient."""
    return sum(itemsize * (rows + 2) * rank for rows, rank in rows_and_ranks)


def stacking_pays(rows: int, stack_rank: int, runs: Iterable[tuple[int, int, int]], d_in: int, d_out: int) -> bool:
    """Whether one GEMM over the whole stack with foreign columns selected out beats one batched GEMM a run.

    `runs` are (count, rows, rank).
    """
    shapes = list(runs)
    segmented = flops(((count * r, rank) for count, r, rank in shapes), d_in, d_out) + RUN_FLOPS * len(shapes)
    return flops([(rows, stack_rank)], d_in, d_out) + STACK_FLOPS < segmented

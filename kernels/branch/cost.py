"""Work of the branch op, and which of its two CPU forms is cheaper. Torch-free."""

from collections.abc import Iterable

DISPATCH_FLOPS = 6_000_000  # three small matmuls cost about 20 us at 300 GFLOP/s before they do anything


def flops(rows_and_ranks: Iterable[tuple[int, int]], d_in: int, d_out: int) -> int:
    """Multiply-adds x 2 of the forward over segments of (rows, rank)."""
    return sum(2 * rows * rank * (d_in + d_out) for rows, rank in rows_and_ranks)


def bytes_moved(rows_and_ranks: Iterable[tuple[int, int]], d_in: int, d_out: int, *, itemsize: int) -> int:
    """Bytes read and written by the forward when every segment's weights and rows are touched once."""
    return sum(itemsize * ((rows + rank) * (d_in + d_out) + 2 * rows * rank) for rows, rank in rows_and_ranks)


def stacking_pays(rows: int, stack_rank: int, runs: Iterable[tuple[int, int, int]], d_in: int, d_out: int) -> bool:
    """Whether one GEMM over the whole stack with foreign columns selected out beats one batched GEMM a run.

    `runs` are (count, rows, rank).
    """
    shapes = list(runs)
    segmented = flops(((count * r, rank) for count, r, rank in shapes), d_in, d_out) + DISPATCH_FLOPS * len(shapes)
    return flops([(rows, stack_rank)], d_in, d_out) + DISPATCH_FLOPS < segmented

"""Work of attention over ragged sequences with prefixes. Torch-free."""

from collections.abc import Iterable

SCORE_BLOCK = 64  # queries whose scores exist at a time where attention of whole sequences is compiled (whole.cpp)


def flops(lengths_and_prefixes: Iterable[tuple[int, int]], heads: int, head_dim: int) -> int:
    """Two matmuls over the causal half and the whole prefix, forward."""
    return sum(4 * heads * head_dim * (n * (n + 1) // 2 + n * p) for n, p in lengths_and_prefixes)


def bytes_moved(lengths_and_prefixes: Iterable[tuple[int, int]], width: int, kv_width: int, *, itemsize: int) -> int:
    """Queries, outputs, keys and values of every sequence touched once."""
    return sum(itemsize * (2 * n * width + 2 * (n + p) * kv_width) for n, p in lengths_and_prefixes)


def score_bytes(
    lengths_and_prefixes: Iterable[tuple[int, int]], heads: int, *, itemsize: int, block: int | None = None
) -> int:
    """The most that a backward holds at a time beside its inputs: of every sequence at its padded length, for each
    score six numbers in float32 and three in the inputs' dtype. Scores exist as a whole (`op.py`), or for `block`
    queries at a time (`whole.py`; what one head at a time needs, counted for all of them)."""
    padded = [max(32, -(-(n + p) // 16) * 16) for n, p in lengths_and_prefixes]
    each = 6 * 4 + 3 * itemsize
    return sum(heads * min(length, block or length) * length * each for length in padded)

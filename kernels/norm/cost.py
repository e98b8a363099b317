"""Work of the norm op. Torch-free."""


def flops(rank: int, d_in: int, d_out: int) -> int:
    """A W^T, A A^T and the two contractions with B."""
    return 2 * rank * d_in * d_out + 2 * rank * rank * d_in + 2 * rank * rank * d_out + 4 * rank * d_out


def bytes_moved(rank: int, d_in: int, d_out: int, *, itemsize: int) -> int:
    """W, A and B read once, the norms written."""
    return itemsize * (d_in * d_out + rank * (d_in + d_out)) + 4 * d_out


def gram(rank: int, d_in: int, *, itemsize: int) -> tuple[int, int]:
    """(flops, bytes) of A A^T."""
    return 2 * rank * rank * d_in, itemsize * rank * d_in + 4 * rank * rank


def norms(rank: int, d_out: int, *, itemsize: int) -> tuple[int, int]:
    """(flops, bytes) of the norms from it."""
    return 2 * rank * rank * d_out + 4 * rank * d_out, 2 * itemsize * rank * d_out + 4 * (rank * rank + 2 * d_out)

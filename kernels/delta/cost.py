"""Work of the delta op. Torch-free."""


def flops(rows: int, d_in: int, d_out: int) -> int:
    """One product a segment; what the generator computes is its own."""
    return 2 * rows * d_in * d_out


def bytes_moved(rows: int, d_in: int, d_out: int, *, itemsize: int) -> int:
    """The dense matrix written and read once, rows read, results read and written."""
    return (2 * d_in * d_out + rows * (d_in + 2 * d_out)) * itemsize

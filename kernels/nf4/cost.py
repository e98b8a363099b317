"""Work of the nf4 op. Torch-free."""

BLOCK = 64  # weights that share a factor


def flops(rows: int, d_in: int, d_out: int) -> int:
    """Of the product; the branch beside it has its own."""
    return 2 * rows * d_in * d_out


def bytes_moved(rows: int, d_in: int, d_out: int, *, itemsize: int) -> int:
    """Half a byte a weight and a float32 factor a block, rows read and results written."""
    return d_in * d_out // 2 + 4 * d_in * d_out // BLOCK + rows * (d_in + d_out) * itemsize

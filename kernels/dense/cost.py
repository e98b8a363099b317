"""Work of the dense op. Torch-free."""


def flops(rows: int, d_in: int, d_out: int) -> int:
    """Of the product; the branches beside it have their own."""
    return 2 * rows * d_in * d_out


def bytes_moved(rows: int, d_in: int, d_out: int) -> int:
    """Weights, rows and results once, in bf16."""
    return 2 * (d_in * d_out + rows * (d_in + d_out))

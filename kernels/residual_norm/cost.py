"""Work of the residual_norm op. Torch-free."""


def flops(rows: int, width: int) -> int:
    """The sum, the mean square, the quotient and the product, forward."""
    return 5 * rows * width


def bytes_moved(rows: int, width: int, *, itemsize: int) -> int:
    """x and the update read, the sum and its norm written, the weight read once."""
    return itemsize * width * (4 * rows + 1)

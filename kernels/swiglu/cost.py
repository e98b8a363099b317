"""Work of the swiglu op. Torch-free."""


def flops(rows: int, width: int) -> int:
    """The exponential counted as eight, forward."""
    return 11 * rows * width


def bytes_moved(rows: int, width: int, *, itemsize: int) -> int:
    """Both factors read, the product written."""
    return 3 * itemsize * rows * width

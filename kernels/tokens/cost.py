"""Work of the tokens op. Torch-free."""


def flops(rows: int, width: int) -> int:
    """One add an element where rows are added; nothing where they are put in place."""
    return rows * width


def bytes_moved(rows: int, width: int, *, itemsize: int) -> int:
    """Rows read from the stack and written to the batch."""
    return rows * width * (4 + itemsize)

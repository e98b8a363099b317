"""Work of the sparse op. Torch-free."""


def flops(rows: int, entries: int) -> int:
    """One multiply and one add an entry; whole rows of S have `d_in` entries each."""
    return 2 * rows * entries


def bytes_moved(rows: int, entries: int, d_out: int, *, itemsize: int) -> int:
    """Of every entry its value, its place and the column of x that it meets; results read and written."""
    return entries * (4 + 16 + rows * itemsize) + 2 * rows * d_out * itemsize


def column_bytes(rows: int, size: int, *, itemsize: int) -> int:
    """Whole rows of S: of every one its place, and a column read and written."""
    return size * (8 + 2 * rows * itemsize)

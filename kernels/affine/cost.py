"""Work of the affine op. Torch-free."""


def flops(rows: int, width: int) -> int:
    """One multiply and one add an element."""
    return 2 * rows * width


def bytes_moved(rows: int, width: int, grafts: int, *, itemsize: int) -> int:
    """Rows read and written once, and the float32 vectors of every graft present."""
    return 2 * rows * width * itemsize + 2 * grafts * width * 4

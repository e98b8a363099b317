"""Work of the rotate op. Torch-free."""


def flops(rows: int, width: int, *, block: int, stages: int = 1) -> int:
    """One product with a block a stage; a low-rank rotation of rank r costs what blocks of 2 r do, pairs those of
    2."""
    return 2 * rows * width * block * stages


def bytes_moved(rows: int, width: int, grafts: int, *, block: int, itemsize: int, stages: int = 1) -> int:
    """Rows read and written once a stage, and the float32 blocks of every graft present."""
    return stages * (2 * rows * width * itemsize + grafts * width * block * 4)

"""How many rows a forward has under the row-invariance contract (design: a multiple of 8 and at least 16)."""

GRAIN, FLOOR = 8, 16


def padded(rows: int) -> int:
    """Rows after padding."""
    return max(FLOOR, -(-rows // GRAIN) * GRAIN)

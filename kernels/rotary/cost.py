"""Work of the rotary op. Torch-free."""


def flops(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Two products and a sum for every number of a query or a key."""
    return 3 * rows * (heads + kv_heads) * head_dim


def bytes_moved(rows: int, heads: int, kv_heads: int, head_dim: int, *, itemsize: int) -> int:
    """Queries read and written, keys and values read and put in the cache, angles read."""
    return 2 * itemsize * rows * head_dim * (heads + 2 * kv_heads + 1)

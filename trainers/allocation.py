"""Which errors are a lack of memory."""

from __future__ import annotations


def allocation_failed(error: BaseException) -> bool:
    """Whether it says that memory was short, or could never suffice."""
    said = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)

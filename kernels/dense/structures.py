"""What linear.cpp is given, field by field: each has 8 bytes, in the order that its structures have there."""

from __future__ import annotations

import ctypes

CALL = (
    *("x", "stride", "rows", "in", "W", "layout", "members", "member_count"),
    *("y", "out_stride", "branch_count", "threads", "next"),
)
MEMBER = ("panel", "column", "width")
BRANCH = ("A", "B", "segments", "count", "from", "depth", "column", "width", "act", "kept", "mask")
OUTER = ("kept", "x", "stride", "width", "segments", "count", "out", "adds")


class Segment(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("start", "stop", "first", "last")), ("scale", ctypes.c_double)]


SIZES = {
    **{"Call": 8 * len(CALL), "Member": 8 * len(MEMBER), "Branch": 8 * len(BRANCH), "Outer": 8 * len(OUTER)},
    "Segment": ctypes.sizeof(Segment),
}

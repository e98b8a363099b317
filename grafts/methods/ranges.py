"""What a search may try for an argument of a method: the argument's type says it, where it is declared. Torch-free.

`def lora(r: Rank = 8, ...)` takes any integer when a user writes it, and the values of `Rank` when a space is made of
it (`tuning/space.py`). The ranges are wide; a space leaves out what means nothing on its backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args, get_origin

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Range:
    """The values, ascending when they are `ordered`; of unordered ones none is nearer to another than the rest."""

    values: tuple[Value, ...]
    ordered: bool = True


def doubled(low: int, high: int) -> Range:
    """`low`, twice `low`, ... up to `high`."""
    values = [low]
    while values[-1] * 2 <= high:
        values.append(values[-1] * 2)
    return Range(tuple(values))


def plain(annotation: object) -> object:
    """The type of an argument without its range."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def range_of(annotation: object) -> Range | None:
    """The range in an argument's type, None if it is not searched."""
    return next((one for one in get_args(annotation)[1:] if isinstance(one, Range)), None)


Rank = Annotated[int, doubled(1, 128)]
WideRank = Annotated[int, doubled(32, 1024)]  # of frozen factors, which cost nothing to train
Width = Annotated[int, doubled(1, 512)]  # of a bottleneck
Rows = Annotated[int, doubled(1, 128)]  # of a prefix or prompt
Ends = Annotated[int, Range((1, 3, 5, 7, 11))]  # positions at an end of the prompt, as ReFT's authors tried
Count = Annotated[int, doubled(64, 4096)]  # of numbers that a whole matrix, or graft, is made of
Block = Annotated[int, doubled(4, 64)]  # of a rotation
Piece = Annotated[int, doubled(32, 256)]  # of a matrix that is cut into such, if they divide its width
Experts = Annotated[int, Range((2, 3, 4, 8))]
Alpha = Annotated[float, Range((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0))]
Scale = Annotated[float, Range((0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0))]
Dropout = Annotated[float, Range((0.0, 0.05, 0.1, 0.2))]
Density = Annotated[float, Range((0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5))]
Projections = Annotated[str, Range(("attn.[qv]", "attn.[qkvo]", "ffn.*", "linear"), ordered=False)]
Sublayers = Annotated[str, Range(("attn.out", "ffn.out", "attn.out|ffn.out"), ordered=False)]

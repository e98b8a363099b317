"""Functions of C++ sources, compiled for this processor, and calls of them that are ready to be made.

A function takes the address of one structure, whose fields have 8 bytes each; a call is a jump with nothing to convert,
and a list of calls is made without coming back to Python.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from polygraft.kernels.compiled.build import Unavailable, build

DTYPES = {torch.bfloat16: 0, torch.float32: 1}  # as rows.h numbers them
EXACTLY = "-ffp-contract=off"  # products are rounded before they are added, where the source does not say otherwise
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def structure(name: str, **fields: str) -> type[ctypes.Structure]:
    """A structure of pointers, integers and numbers, each kind's names in one text in their order; what C++ calls
    `name` and must lay out alike."""
    kinds = {"pointers": POINTER, "integers": INTEGER, "numbers": NUMBER}
    members = [(member, kinds[kind.rstrip("_")]) for kind, names in fields.items() for member in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


@dataclass(frozen=True, slots=True)
class Function:
    """A compiled function; `arguments` is the structure that it takes the address of."""

    name: str
    jump: Callable[[int], None]
    address: int
    arguments: type[ctypes.Structure]
    _fields: tuple[str, ...] = field(init=False, repr=False)
    _packed: Callable[..., bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = [kind for _, kind in self.arguments._fields_]  # type: ignore[misc]
        object.__setattr__(self, "_fields", tuple(name for name, _ in self.arguments._fields_))  # type: ignore[misc]
        object.__setattr__(self, "_packed", Struct("".join("d" if kind is NUMBER else "q" for kind in kinds)).pack)

    def ready(self, *keeps: object, **arguments: object) -> Call:
        """A call with these arguments, tensors among them as the addresses of their data; `keeps` live as long as it
        does, as do those tensors. What is not given, or None, is 0."""
        given = map(arguments.get, self._fields)  # a structure that is packed takes half the time of one made by names
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in given]
        made = self.arguments.from_buffer_copy(self._packed(*numbers))
        place = ctypes.addressof(made)
        rows = place + self.arguments.rows.offset if "rows" in arguments else 0
        return Call(self.name, self.jump, self.address, place, (made, keeps, arguments), rows)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that may be made any number of times: the function, where it lies, where what it takes lies, and where in
    that the number of rows lies, which may be changed, and where it is told of the next call of its function, so that
    it fetches what that reads; 0 where it has none."""

    name: str
    jump: Callable[[int], None]
    function: int
    arguments: int
    keeps: object = field(repr=False)
    rows: int = 0
    following: int = 0

    def __call__(self) -> None:
        self.jump(self.arguments)


class Calls:
    """Calls that are made one after the other, in one step out of Python."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)
        for call, following in pairwise(call for call in calls if call.following):
            ctypes.c_int64.from_address(call.following).value = following.arguments
        functions = array("q", [call.function for call in calls])
        arguments = array("q", [call.arguments for call in calls])
        run = function(Path(__file__).with_name("run.cpp"), "run", _RUN)
        assert run is not None
        places = functions.buffer_info()[0], arguments.buffer_info()[0]
        self._run = run.ready(functions, arguments, functions=places[0], arguments=places[1], count=len(calls))

    def __call__(self) -> None:
        self._run()


_RUN = structure("Run", pointers="functions arguments", integers="count")


@cache
def function(
    source: Path, name: str, arguments: type[ctypes.Structure], *others: type[ctypes.Structure]
) -> Function | None:
    """A function of a source; None where sources cannot be compiled: nothing but speed depends on it. The source tells
    the sizes of its structures, of `others` that the arguments point to, too, as `size_of_NAME`."""
    library = _library(source)
    if library is None:
        return None
    for kind in (arguments, *others):
        size = library[f"size_of_{kind.__name__.lower()}"]
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(kind), f"{source.name}: its {kind.__name__} is another structure"
    jump = library[name]
    jump.argtypes, jump.restype = [ctypes.c_void_p], None
    address = ctypes.cast(jump, ctypes.c_void_p).value
    assert address is not None
    return Function(name, jump, address, arguments)


@cache
def _library(source: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(build(source, EXACTLY)))
    except (Unavailable, OSError) as error:
        logging.getLogger(__name__).info("%s is torch's: %s", source.stem, error)
        return None


def computes(*tensors: Tensor | None) -> bool:
    """Whether compiled functions read these: on the CPU, in bf16 or float32."""
    return all(x is None or (x.is_cpu and x.dtype in DTYPES) for x in tensors)

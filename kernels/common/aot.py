"""What compilation alone says of a Triton program, without a GPU: registers, spills, shared memory, tensor-core
instructions; and the least time that a card's peak figures allow its work.

These are compiled facts and a cost model. No time here is a measured one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync)\b")
_POINTERS = {"table_ptr": "*i64", "scales_ptr": "*fp64", "tiles_ptr": "*i32"}  # of every plan


@dataclass(frozen=True, slots=True)
class Card:
    """Peak figures as the vendor states them (dense), and the shared memory that one block may have."""

    name: str
    arch: int
    flops: float
    bytes: float
    shared: int
    source: str


CARDS = (
    Card("A100 SXM 80 GB", 80, 312e12, 2039e9, 163 << 10, "NVIDIA A100 datasheet: 312 TFLOP/s bf16, 2039 GB/s"),
    Card("H100 SXM 80 GB", 90, 989e12, 3350e9, 227 << 10, "NVIDIA H100 datasheet: 989 TFLOP/s bf16, 3.35 TB/s"),
)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A program as launches specialise it: values of its constexprs, types of its pointers (bf16 where none is named),
    and the `work` of a launch by the op's cost.py.

    `dot` says whether it multiplies matrices, and so has to use tensor cores.
    """

    name: str
    program: Callable[..., None]
    constants: Mapping[str, object]
    work: str
    flops: int
    bytes: int
    pointers: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bf16"
    dot: bool = True
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Facts:
    """What the compiler made of a program for one architecture."""

    ptx: str
    registers: int  # of a thread
    spilled: int  # bytes, stores and loads together
    shared: int  # bytes of a block
    tensor_core: frozenset[str]  # the instructions' names


def compiled(tuned: Tuned, arch: int) -> Facts:
    """Compile for sm_`arch`, with pointers and sizes that are multiples of 16 as launches find them."""
    names = tuned.program.arg_names  # type: ignore[attr-defined]
    constants = tuned.constants
    assert constants.keys() == {name for name in names if name.isupper()}, (tuned.name, names)
    signature = {name: "constexpr" if name in constants else _type(tuned, name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    source = ASTSource(fn=tuned.program, signature=signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": tuned.warps, "num_stages": tuned.stages}
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(StringIO()) as said:
        knobs.compilation.always_compile = True  # what comes from Triton's cache was assembled before, and unheard
        knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, (registers, spilled) = str(made.asm["ptx"]), _assembled(said.getvalue())
    return Facts(ptx, registers, spilled, int(made.metadata.shared), frozenset(TENSOR_CORE.findall(ptx)))


def roofline(tuned: Tuned, card: Card) -> float:
    """Seconds that the work needs at least: its flops at the card's peak or its bytes at the peak, the longer of both.

    A model, not a measurement.
    """
    return max(tuned.flops / card.flops, tuned.bytes / card.bytes)


def _type(tuned: Tuned, name: str) -> str:
    if name.endswith("_ptr"):
        return tuned.pointers.get(name) or _POINTERS.get(name) or f"*{tuned.dtype}"
    return tuned.scalars.get(name, "i32")


def _assembled(log: str) -> tuple[int, int]:
    """(registers, spilled bytes) that ptxas reported."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None or len(spills) != 2:
        raise RuntimeError(f"ptxas reports no resources: {log}")
    return int(registers[1]), sum(map(int, spills))

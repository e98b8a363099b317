"""Op keys: what may share one op call at a site, an op and the fields that change its arithmetic.

A site runs its ops by phase, in the order in which `Phase` lists them, and those of one phase by their `rank`, whoever
came first: what a row meets must not depend on the other grafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any, ClassVar, Literal

from polygraft.grafts.spec import KV, Act, Affine, Branch, Delta, Norm, Rotate, Slot, Sparse, Tokens
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.rotate.rotation import Rotation


class Phase(IntEnum):
    """When an op acts at a site; this is the order (docs/architecture.md)."""

    TOKENS = auto()  # rows of the input embeddings
    KEYS = auto()  # rows of the prefix, in attention
    ROTATE_INPUT = auto()
    AFFINE_INPUT = auto()
    OWN = auto()  # the site's own function: a projection with the branches fused into it, a norm, a sublayer
    GATED_BRANCH_OF_INPUT = auto()
    BRANCH_OF_INPUT = auto()
    GATED_BRANCH_OF_OUTPUT = auto()
    BRANCH_OF_OUTPUT = auto()
    SPARSE = auto()
    DELTA = auto()
    NORM = auto()
    SCALE_ROWS = auto()  # of W, before the projection's bias
    BIAS = auto()
    AFFINE_OUTPUT = auto()
    ROTATE_OUTPUT = auto()


# Sums of floating-point numbers have an order, and a graft may have branches of several kinds at a site.
_ACTS: tuple[Act, ...] = ("tanh", "silu", "relu", "identity", "gelu")
_GATES: tuple[str, ...] = ("softmax", "sigmoid", "noise", "attention")
Rank = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BranchKey:
    wide: ClassVar[bool] = False  # whether operands stay in float32 or wider: bf16 has no room near 1
    tap: Literal["input", "output"]
    act: Act
    bias: bool = False

    @property
    def phase(self) -> Phase:
        return Phase.BRANCH_OF_INPUT if self.tap == "input" else Phase.BRANCH_OF_OUTPUT

    @property
    def rank(self) -> Rank:
        return _ACTS.index(self.act), not self.bias


@dataclass(frozen=True, slots=True)
class GatedKey:
    wide: ClassVar[bool] = False
    tap: Literal["input", "output"]
    act: Act
    gate: Gate

    @property
    def phase(self) -> Phase:
        return Phase.GATED_BRANCH_OF_INPUT if self.tap == "input" else Phase.GATED_BRANCH_OF_OUTPUT

    @property
    def rank(self) -> Rank:
        gate = self.gate
        return _ACTS.index(self.act), _GATES.index(gate.kind), -gate.top, -gate.experts


@dataclass(frozen=True, slots=True)
class NoisyKey:
    wide: ClassVar[bool] = False
    tap: Literal["input", "output"]

    @property
    def phase(self) -> Phase:
        return Phase.GATED_BRANCH_OF_INPUT if self.tap == "input" else Phase.GATED_BRANCH_OF_OUTPUT

    @property
    def rank(self) -> Rank:
        return _ACTS.index("identity"), _GATES.index("noise")


@dataclass(frozen=True, slots=True)
class AffineKey:
    wide: ClassVar[bool] = True
    side: Literal["in", "out", "rows"]
    scale: bool
    shift: bool

    @property
    def phase(self) -> Phase:
        return {"in": Phase.AFFINE_INPUT, "out": Phase.AFFINE_OUTPUT, "rows": Phase.SCALE_ROWS}[self.side]

    @property
    def rank(self) -> Rank:
        return not self.scale, not self.shift  # a scale comes before a shift: y * g + b


@dataclass(frozen=True, slots=True)
class RotateKey:
    wide: ClassVar[bool] = True
    side: Literal["in", "out"]
    rotation: Rotation

    @property
    def phase(self) -> Phase:
        return Phase.ROTATE_INPUT if self.side == "in" else Phase.ROTATE_OUTPUT

    @property
    def rank(self) -> Rank:
        rotation = self.rotation
        return ("pairs", "lowrank", "blocks").index(rotation.kind), -rotation.size, -rotation.stages


@dataclass(frozen=True, slots=True)
class NormKey:
    wide: ClassVar[bool] = True
    phase: ClassVar[Phase] = Phase.NORM
    rank: ClassVar[Rank] = ()


@dataclass(frozen=True, slots=True)
class DeltaKey:
    wide: ClassVar[bool] = True
    phase: ClassVar[Phase] = Phase.DELTA
    rank: ClassVar[Rank] = ()


@dataclass(frozen=True, slots=True)
class SparseKey:
    wide: ClassVar[bool] = True
    phase: ClassVar[Phase] = Phase.SPARSE
    rows: bool

    @property
    def rank(self) -> Rank:
        return (not self.rows,)


@dataclass(frozen=True, slots=True)
class KVKey:
    """Prefix rows in the cache, in a softmax of their own (`aside`), or weighed by each row in the one softmax (with a
    gate)."""

    wide: ClassVar[bool] = False
    phase: ClassVar[Phase] = Phase.KEYS
    aside: bool = False
    gate: Literal["none", "sigmoid", "softmax"] = "none"

    @property
    def rank(self) -> Rank:
        return ("softmax", "sigmoid", "none").index(self.gate), not self.aside


@dataclass(frozen=True, slots=True)
class TokensKey:
    wide: ClassVar[bool] = True
    phase: ClassVar[Phase] = Phase.TOKENS
    mode: Literal["before", "replace", "add"]
    gate: Literal["none", "highest", "relu"] = "none"

    @property
    def rank(self) -> Rank:
        return ("replace", "before", "add").index(self.mode), ("relu", "highest", "none").index(self.gate)


OpKey = BranchKey | GatedKey | NoisyKey | AffineKey | RotateKey | NormKey | DeltaKey | SparseKey | KVKey | TokensKey


def op_key(slot: Slot) -> OpKey:
    """The key of a slot's op."""
    return _KEYS[type(slot)](slot)


def rotation(slot: Rotate) -> Rotation:
    """A slot's rotation as the op takes it: sizes that its kind has not are left out, so that those share a call."""
    size = 0 if slot.kind == "lowrank" else slot.size
    return Rotation(slot.kind, size, slot.stages)


def _branch(slot: Branch) -> OpKey:
    if slot.gate == "none":
        return BranchKey(slot.tap, slot.act, slot.bias)
    if slot.gate == "noise":
        return NoisyKey(slot.tap)
    attends = slot.gate == "attention"
    return GatedKey(slot.tap, slot.act, Gate(slot.gate, 0 if attends else slot.top, slot.experts if attends else 0))


_KEYS: Mapping[type[Slot], Callable[[Any], OpKey]] = {
    Branch: _branch,
    Affine: lambda slot: AffineKey(slot.side, slot.scale, slot.shift),
    Norm: lambda slot: NormKey(),
    KV: lambda slot: KVKey(slot.aside and slot.gate == "none", slot.gate),
    Delta: lambda slot: DeltaKey(),
    Sparse: lambda slot: SparseKey(slot.rows),
    Rotate: lambda slot: RotateKey(slot.side, rotation(slot)),
    Tokens: lambda slot: TokensKey(slot.mode, slot.gate),
}

"""Bottleneck adapters, y += s (B act(A t + a) + b): serial ones tap the output t = y of what they stand at, parallel
ones its input.

Houlsby et al. 2019 (arXiv 1902.00751, figure 2) have one after each sublayer, Pfeiffer et al. 2021 (arXiv 2005.00247,
section 3) one after each layer, on the residual stream; He et al. 2022 (arXiv 2110.04366, table 1) one beside the
feed-forward with s = 4, AdaptFormer (Chen et al. 2022, arXiv 2205.13535, eq. 3) the same with s = 0.1. `bias` is 1 or
0; b absorbs s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from polygraft.grafts.methods.additive.prefix import prefix
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.spec import Act, Affine, Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def serial(size: int = 64, act: str = "gelu", at: str = "attn.out|ffn.out", bias: int = 0) -> tuple[Slot, ...]:
    return _with_bias(Branch(at=at, rank=size, act=act_of(act), tap="output", bias=_flag(bias)))


def pfeiffer(size: int = 64, act: str = "relu", at: str = "block.out", bias: int = 1) -> tuple[Slot, ...]:
    return serial(size, act, at, bias)


def parallel(
    size: int = 64, scale: float = 4.0, act: str = "relu", at: str = "ffn.out", bias: int = 0
) -> tuple[Slot, ...]:
    return _with_bias(Branch(at=at, rank=size, scale=scale, act=act_of(act), bias=_flag(bias)))


def adaptformer(size: int = 64, scale: float = 0.1) -> tuple[Slot, ...]:
    return parallel(size, scale, bias=1)


def scaled_parallel(size: int = 64, act: str = "relu", at: str = "ffn.out") -> tuple[Slot, ...]:
    """A parallel adapter whose factor s is trained, from 1 (AdapterHub's scaled_par_bn, without biases)."""
    return (Branch(at=at, rank=size, act=act_of(act), form=DeclRef("scaled")),)


def mam(length: int = 30, size: int = 512, scale: float = 4.0) -> tuple[Slot, ...]:
    """Mix-and-match: a short prefix on attention and a large parallel adapter (He et al. 2022, section 4.6)."""
    return (*prefix(length), *parallel(size, scale))


def _with_bias(branch: Branch) -> tuple[Slot, ...]:
    return (branch, Affine(at=branch.at, scale=False, shift=True)) if branch.bias else (branch,)


def act_of(name: str) -> Act:
    for choice in get_args(Act):
        if choice == name:
            return choice  # type: ignore[no-any-return]
    raise SpecError(f"peft: act: {name!r} is not an activation; choices: {', '.join(get_args(Act))}")


def _flag(bias: int) -> bool:
    if bias not in (0, 1):
        raise SpecError(f"peft: bias: {bias} is neither 0 nor 1")
    return bias == 1


def _own(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out)),
        "s": TensorDecl((1,), "one"),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"A": values["A"], "B": values["s"] * values["B"]}


METHODS = (
    Method("serial", "arXiv 1902.00751", 1e-3, serial, aliases=("houlsby",)),
    Method("pfeiffer", "arXiv 2005.00247", 1e-3, pfeiffer),
    Method("parallel", "arXiv 2110.04366", 1e-3, parallel),
    Method("scaled-parallel", "arXiv 2110.04366", 1e-3, scaled_parallel),
    Method("adaptformer", "arXiv 2205.13535", 1e-3, adaptformer),
    Method("mam", "arXiv 2110.04366", 1e-3, mam),
)
PARAMETRIZATIONS = (Parametrization("scaled", _operands, _own),)

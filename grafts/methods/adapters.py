"""Bottleneck adapters: serial, h += B gelu(A h) after each sublayer (Houlsby et al. 2019, arXiv 1902.00751), and
parallel to the feed-forward, y += s B relu(A x) (He et al. 2022, arXiv 2110.04366, table 1). Both without biases.
"""

from typing import get_args

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Act, Branch, Slot, SpecError


def serial(size: int = 64, act: str = "gelu", at: str = "attn.out|ffn.out") -> tuple[Slot, ...]:
    return (Branch(at=at, rank=size, act=_act(act), tap="output"),)


def parallel(size: int = 64, scale: float = 4.0, act: str = "relu", at: str = "ffn.out") -> tuple[Slot, ...]:
    return (Branch(at=at, rank=size, scale=scale, act=_act(act)),)


def _act(name: str) -> Act:
    for choice in get_args(Act):
        if choice == name:
            return choice  # type: ignore[no-any-return]
    raise SpecError(f"peft: act: {name!r} is not an activation; choices: {', '.join(get_args(Act))}")


METHODS = (
    Method("serial", "arXiv 1902.00751", 1e-3, serial, aliases=("houlsby",)),
    Method("parallel", "arXiv 2110.04366", 1e-3, parallel),
)

"""Bottleneck adapters, y += s (B act(A t + a) + b): serial ones tap the output t = y of what they stand at, parallel
ones its input. `bias` is 1 or 0; b absorbs s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from polygraft.grafts.methods.additive.prefix import prefix
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Rows, Scale, Sublayers, Width
from polygraft.grafts.spec import Act, Affine, Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def serial(size: Width = 64, act: str = "gelu", at: Sublayers = "attn.out|ffn.out", bias: int = 0) -> tuple[Slot, ...]:
    """h + B act(A h) on the output h of attention and of the feed-forward, before each is added to the residual stream:
    two adapters a layer (Houlsby et al. 2019, arXiv 1902.00751, section 2.1 and figure 2).

    `bias` 1 adds a and b: B act(A h + a) + b.

    Deviations: Biases are off unless asked for, and the layer norms, which the paper trains too, are not: add
    `ln-tuning`.

    Choose when: tasks are far from what the backbone was trained on and a nonlinearity may pay. It stays beside W for
    good, after the sublayer, so it costs time in serving that a LoRA merged into W does not.
    """
    return _with_bias(Branch(at=at, rank=size, act=act_of(act), tap="output", bias=_flag(bias)))


def pfeiffer(size: Width = 64, act: str = "relu", at: str = "block.out", bias: int = 1) -> tuple[Slot, ...]:
    """h + B act(A h + a) + b on the residual stream at the end of each layer: one adapter a layer in place of Houlsby's
    two (Pfeiffer et al. 2021, arXiv 2005.00247, section 2.2.3, and its appendix A.2 and figure 5, which found it).

    Deviations: The paper's backbone is BERT, whose last norm stands around the adapter; where norms come first there is
    none at this place.

    Choose when: you want the adapter that AdapterHub's collections have, at half of `serial`'s cost, or with
    bias=0 adapters to fuse with `fusion(at=block.out)`.
    """
    return serial(size, act, at, bias)


def parallel(
    size: Width = 64, scale: Scale = 4.0, act: str = "relu", at: Sublayers = "ffn.out", bias: int = 0
) -> tuple[Slot, ...]:
    """y + s B relu(A x), an adapter that reads what the feed-forward reads and is added to what it gives (He et al.
    2022, arXiv 2110.04366, table 1 and section 4.5).

    `scale` is s, fixed.

    Deviations: None known for the default; biases are off as in the paper's code, `bias` 1 adds them.

    Choose when: an adapter is wanted: beside the feed-forward it does better than after it in the paper, and it takes
    no extra step after the sublayer. It does not merge.
    """
    return _with_bias(Branch(at=at, rank=size, scale=scale, act=act_of(act), bias=_flag(bias)))


def adaptformer(size: Width = 64, scale: Scale = 0.1) -> tuple[Slot, ...]:
    """y + 0.1 (B relu(A x + a) + b) beside the feed-forward: a parallel adapter with a small fixed factor, made for
    vision transformers (Chen et al. 2022, arXiv 2205.13535, eq. 3).

    Deviations: The paper's adapter reads its layer norm of x; here it reads what the feed-forward reads, which is the
    norm's output where norms come first. b is not multiplied by s, which it absorbs.

    Choose when: you follow a vision recipe, or `parallel` with its factor of 4 does not train stably.
    """
    return parallel(size, scale, bias=1)


def scaled_parallel(size: Width = 64, act: str = "relu", at: Sublayers = "ffn.out") -> tuple[Slot, ...]:
    """A parallel adapter whose factor s is trained, from 1: y + s B relu(A x) (He et al. 2022, arXiv 2110.04366,
    table 1 and section 4.5, which tries it; as AdapterHub's scaled_par_bn).

    Deviations: The paper keeps a factor of 4, since a learned one gave it nothing better; here it is learned, as
    AdapterHub has it. Without biases.

    Choose when: you cannot afford to search for the factor of `parallel`.
    """
    return (Branch(at=at, rank=size, act=act_of(act), form=DeclRef("scaled")),)


def mam(length: Rows = 30, size: Width = 512, scale: Scale = 4.0) -> tuple[Slot, ...]:
    """Mix-and-match: a short prefix at attention and a large parallel adapter beside the feed-forward, the pair that He
    et al. 2022 (arXiv 2110.04366, section 4.6) arrive at.

    Deviations: The paper makes its prefix by a network while it trains; here the rows are free. Write `prefix-mlp(30) +
    parallel(512)` for that.

    Choose when: quality counts more than size: it trains ten times as many numbers as a LoRA of rank 8, and neither
    part merges.
    """
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

"""UniPELT and APT: gates on LoRAs, adapters and prefix rows. A gate reads its module's direct input, what the
projections, the adapter and attention read, of its own row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.prefix import network
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Projections, Rank, Rows, Scale, Sublayers, Width
from polygraft.grafts.spec import KV, Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


def unipelt(
    r: Rank = 8,
    size: Width = 48,
    length: Rows = 10,
    hidden: int = 512,
    at: Projections = "attn.[qv]",
    adapter: Sublayers = "ffn.out",
) -> tuple[Slot, ...]:
    """A LoRA on queries and values, an adapter after the feed-forward and a prefix, each opened by a gate of its own at
    every row: W x + G_L B A x, h + G_A B act(A h), keys and values [G_P P_k; K], [G_P P_v; V], with G = sigmoid(W_G
    input) (Mao et al. 2022, arXiv 2110.07577, section 3.2).

    The prefix is made by a network of `hidden` neurons.

    Deviations: A gate is of the row that it opens for and reads what its module reads. The authors' code takes the mean
    over the sequence for adapter and prefix, which a decoder does not know while it writes. In the paper the adapter
    and its gate read the feed-forward's output after BERT's norm, which a decoder has not got there.

    Choose when: it is not known which of the three suits the task. It does not merge, and the gated prefix lies in no
    cache.
    """
    rows = KV(length=length, aside=True, gate="sigmoid", form=network(hidden))
    return (*unipelt_al(r, size, at, adapter), rows)


def unipelt_al(
    r: Rank = 8, size: Width = 48, at: Projections = "attn.[qv]", adapter: Sublayers = "ffn.out", scale: Scale = 1.0
) -> tuple[Slot, ...]:
    """UniPELT without its prefix: a LoRA and an adapter, each with a gate at every row, W x + s G_L B A x and h + G_A B
    act(A h) (Mao et al. 2022, arXiv 2110.07577, section 3.2).

    `scale` is LoRA's beside its gate, which replaces it in the paper.

    Deviations: The paper's variants are all three, and adapter and prefix; this one is ours. The adapter's gate is of
    the row, where the authors' code takes the mean over the sequence.

    Choose when: `unipelt`'s gated prefix costs too much in attention.
    """
    return (
        Branch(at=at, rank=r, scale=scale, gate="sigmoid"),
        Branch(at=adapter, rank=size, act="relu", tap="output", gate="sigmoid"),
    )


def apt(length: Rows = 16) -> tuple[Slot, ...]:
    """Adaptive prefix tuning: a gate for every prefix row and a factor for every layer, l a * [P_k; P_v] with a =
    sigmoid(W x), x what attention reads (Zhang et al. 2023, arXiv 2305.15212, eq. 4 and 5).

    Deviations: The gates are of the row that attends, computed from its own input after the norm, where the paper has
    the previous layer's states; the rows are free, where the authors' code may make them by a network.

    Choose when: `prefix` is wanted with rows that open where they are of use. The rows lie in no cache and cost a
    second softmax.
    """
    return (KV(length=length, aside=True, gate="sigmoid", experts=length, form=DeclRef("apt")),)


def _own(slot: KV, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "k": TensorDecl((slot.length, place.d_out), "prefix"),
        "v": TensorDecl((slot.length, place.d_out), "prefix"),
        "G": TensorDecl((slot.experts, place.d_in), "kaiming"),
        "l": TensorDecl((1,), "one"),
    }


def _operands(slot: KV, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"k": values["l"] * values["k"], "v": values["l"] * values["v"], "G": values["G"]}


METHODS = (
    Method("unipelt", "arXiv 2110.07577", 3e-4, unipelt),
    Method("unipelt-al", "arXiv 2110.07577", 3e-4, unipelt_al),
    Method("apt", "arXiv 2305.15212", 5e-3, apt),
)
PARAMETRIZATIONS = (Parametrization("apt", _operands, _own),)

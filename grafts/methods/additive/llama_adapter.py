"""LLaMA-Adapter: a prompt at every layer's attention, in a softmax of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import KV, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


def llama_adapter(length: Rows = 10) -> tuple[Slot, ...]:
    """Every row also attends to a trained prompt P, in a softmax of its own times a gate that starts at 0: h += g
    softmax(q (W_k P)^T / sqrt(d)) W_v P (Zhang et al. 2023, arXiv 2303.16199, eq. 7 and 8).

    Deviations: The gate enters as it is, as in PEFT, where the paper at ICLR 2024 takes its tanh; biases of W_k and W_v
    are left out. The paper takes the topmost layers, here all do unless `@` says which.

    Choose when: training must start exactly at the bare backbone and still use prompts. It costs a second softmax in
    every chosen layer and does not merge.
    """
    return (KV(length=length, aside=True, form=DeclRef("llama-adapter")),)


def _own(slot: KV, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {"P": TensorDecl((slot.length, place.d_in), DeclRef("normal", (("std", 1.0),))), "gate": TensorDecl((1,))}


def _operands(slot: KV, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    P = values["P"]
    k, v = (P @ lowering.weight(name).to(P.dtype).T for name in ("attn.k", "attn.v"))
    return {"k": k, "v": values["gate"] * v}


METHODS = (Method("llama-adapter", "arXiv 2303.16199", 5e-3, llama_adapter),)
PARAMETRIZATIONS = (Parametrization("llama-adapter", _operands, _own),)
PEFT = (
    Peft(
        kind="ADAPTION_PROMPT",
        method="llama-adapter",
        only_on=("llama", "mistral"),
        names={"length": ("adapter_len", 10)},
        reads=("adapter_layers", "target_modules"),
        sides={},
        layered=False,
        topmost="adapter_layers",
        own={
            "P": Kept("adaption_prompt", shape=lambda slot: (1, slot.length, -1)),
            "gate": Kept("adaption_gate"),
        },
    ),
)

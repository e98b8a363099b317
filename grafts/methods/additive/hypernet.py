"""Hyperformer: the matrices of the serial adapters are a linear function of a code, and a site's code is a small
network's function of its embedding; the networks are shared by all sites (Karimi Mahabadi et al. 2021, arXiv
2106.04489, section 2). One task, so that the embedding is the site's own; without the norms' own networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def hypernet_adapter(
    size: int = 24, embedding: int = 64, code: int = 32, act: str = "gelu", at: str = "attn.out|ffn.out"
) -> tuple[Slot, ...]:
    form = DeclRef("hypernet-adapter", (("embedding", embedding), ("code", code)))
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=form),)


def _own(slot: Branch, place: SiteShape, embedding: int, code: int) -> Mapping[str, TensorDecl]:
    return {"e": TensorDecl((embedding,), DeclRef("normal", (("std", 1.0),)))}


def _shared(slot: Branch, places: Sequence[SiteShape], embedding: int, code: int) -> Mapping[str, TensorDecl]:
    width = places[0].d_out  # that of the residual stream, wherever a serial adapter stands
    if min(embedding, code) < 1:
        raise SpecError(f"peft: hypernet-adapter: embedding {embedding} and code {code} are sizes; give at least 1")
    return {
        "first": TensorDecl((code, embedding), "kaiming"),
        "second": TensorDecl((code, code), "kaiming"),
        "down": TensorDecl((slot.rank * width, code), DeclRef("normal", (("std", 1 / sqrt(width * code)),))),
        "up": TensorDecl((slot.rank * width, code)),
    }


def _operands(
    slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, embedding: int, code: int
) -> Mapping[str, Tensor]:
    made = values["second"] @ (values["first"] @ values["e"]).relu()
    return {"A": (values["down"] @ made).view(slot.rank, -1), "B": (values["up"] @ made).view(slot.rank, -1)}


METHODS = (Method("hypernet-adapter", "arXiv 2106.04489", 3e-4, hypernet_adapter),)
PARAMETRIZATIONS = (Parametrization("hypernet-adapter", _operands, _own, _shared, formerly="hyperformer"),)

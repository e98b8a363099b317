"""Serial adapters that a network makes, the same for all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Sublayers, Width
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def hypernet_adapter(
    size: Width = 24, embedding: int = 64, code: int = 32, act: str = "gelu", at: Sublayers = "attn.out|ffn.out"
) -> tuple[Slot, ...]:
    """Serial adapters whose matrices are a linear function of a code, the code being a small network's function of a
    trained embedding of the site; the networks are shared by all sites. It is HyperFormer's way to make adapters
    (Karimi Mahabadi et al. 2021, arXiv 2106.04489, section 2) for one task.

    Deviations: Networks shared by all layers are HyperFormer++'s. HyperFormer is for several tasks at once: its
    embeddings are of task, layer and position, and the tasks share what the networks learn. A job here has one task, so
    that point is lost, and hence the name. The network that makes the layer norms' weights is left out, too.

    Choose when: layers should share what they learn. It trains more numbers than the adapters it makes, and is served
    as plain adapters.
    """
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

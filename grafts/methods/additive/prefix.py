"""Trained keys and values before every layer's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import KV, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


Values = Mapping[str, "Tensor"]


def prefix(length: Rows = 10) -> tuple[Slot, ...]:
    """Trained keys and values before every layer's own: K <- [P_k; K], V <- [P_v; V] (Li & Liang 2021, arXiv
    2101.00190, section 4.2, eq. 3; trained without a network it is p-tuning v2, Liu et al. 2022, arXiv 2110.07602).
    They start as the keys and values of real text.

    `prefix-tuning` and `p-tuning-v2` mean this one, as PREFIX_TUNING does in PEFT; the paper's network that makes the
    rows is `prefix-mlp`.

    Deviations: Li & Liang train the rows through a network (`prefix-mlp`); p-tuning v2's classification head is not
    here.

    Choose when: quality is wanted from few numbers that are cheap to serve: the rows lie in the cache and cost nothing
    else. It does not merge, and a high learning rate is needed.
    """
    return (KV(length=length),)


def prefix_mlp(length: Rows = 10, hidden: int = 512) -> tuple[Slot, ...]:
    """Prefix rows made by one network of two layers from one small embedding, [k_l; v_l] = W2_l tanh(W1 E + b1) + b2_l,
    while they are trained (Li & Liang 2021, arXiv 2101.00190, section 4.3).

    Deviations: None known. What is served and written for PEFT is the rows that it made.

    Choose when: `prefix` does not train stably. The network is large (its last layer makes all layers' rows), the graft
    that is served is not.
    """
    return (KV(length=length, form=network(hidden)),)


def network(hidden: int) -> DeclRef:
    """The form of rows made by a network of `hidden` neurons."""
    if hidden < 1:
        raise SpecError(f"peft: hidden: {hidden} is not a size; give at least 1")
    return DeclRef("prefix-mlp", (("hidden", hidden),))


def cartridge(length: Rows = 64, frozen: int = 1) -> tuple[Slot, ...]:
    """A prefix that starts as the keys and values of a long text and is trained on, its first rows staying as they
    start, so that what attends to nothing else goes on to attend to them (Eyuboglu et al. 2025, arXiv 2506.06266,
    section 3.2).

    `frozen` rows stay.

    Deviations: The paper distils from the model with the whole text in its context ("self-study"); here the loss is of
    the job's own samples.

    Choose when: a text that many requests ask about is to be kept in a few hundred rows in place of its tokens.
    """
    if not 0 < frozen < length:
        raise SpecError(f"peft: frozen: {frozen} of {length} rows; give at least 1, and fewer than all")
    return (KV(length=length, form=DeclRef("cartridge", (("frozen", frozen),))),)


def _cut(slot: KV, place: SiteShape, frozen: int) -> Mapping[str, TensorDecl]:
    """Both shares start from real text: the first rows of a prefix, and those after them."""
    found: dict[str, TensorDecl] = {}
    for part in ("k", "v"):
        found[f"{part}0"] = TensorDecl((frozen, place.d_out), DeclRef("cartridge", (("first", 0),)), trained=False)
        found[part] = TensorDecl((slot.length - frozen, place.d_out), DeclRef("cartridge", (("first", frozen),)))
    return found


def _joined(slot: KV, values: Mapping[str, Tensor], lowering: Lowering, frozen: int) -> Mapping[str, Tensor]:
    import torch

    return {part: torch.cat([values[f"{part}0"], values[part]]) for part in ("k", "v")}


def _rows(tensor: TensorSpec, making: Making, first: int) -> Tensor:
    slot = making.spec.slots[tensor.slot]
    assert isinstance(slot, KV) and tensor.site is not None
    k, v = making.prefix(slot.length)[tensor.site]
    return (k if tensor.part.startswith("k") else v)[first : first + tensor.shape[0]]


def _own(slot: KV, place: SiteShape, hidden: int) -> Mapping[str, TensorDecl]:
    return {"G": TensorDecl((slot.experts, place.d_in), "kaiming")} if slot.gate != "none" else {}


def _shared(slot: KV, places: Sequence[SiteShape], hidden: int) -> Mapping[str, TensorDecl]:
    width = places[0].d_out
    return {
        "E": TensorDecl((slot.length, width), DeclRef("normal", (("std", 1.0),))),
        "W1": TensorDecl((hidden, width), "kaiming"),
        "b1": TensorDecl((hidden,)),
        "W2": TensorDecl((2 * len(places) * width, hidden), "kaiming"),
        "b2": TensorDecl((2 * len(places) * width,)),
    }


def _operands(slot: KV, values: Mapping[str, Tensor], lowering: Lowering, hidden: int) -> Mapping[str, Tensor]:
    import torch

    width = lowering.place.d_out
    own = slice(2 * lowering.place.index * width, 2 * (lowering.place.index + 1) * width)
    rows = torch.tanh(values["E"] @ values["W1"].T + values["b1"]) @ values["W2"][own].T + values["b2"][own]
    gates = {"G": values["G"]} if slot.gate != "none" else {}
    return {"k": rows[:, :width], "v": rows[:, width:], **gates}


METHODS = (
    Method("prefix", "arXiv 2101.00190", 5e-3, prefix, aliases=("prefix-tuning", "p-tuning-v2")),
    Method("prefix-mlp", "arXiv 2101.00190", 1e-3, prefix_mlp),
    Method("cartridge", "arXiv 2506.06266", 5e-3, cartridge),
)
PARAMETRIZATIONS = (
    Parametrization("prefix-mlp", _operands, _own, _shared),
    Parametrization("cartridge", _joined, _cut),
)
STARTS = (Start("cartridge", _rows),)
_ROWS = "prompt_embeddings"


def _pack(values: Values, layout: Sequence[TensorSpec], module: Callable[..., str]) -> Values:
    """Row by row the keys and values of all layers, one after the other; of a cartridge the fixed rows first."""
    import torch

    sites = dict.fromkeys(tensor.site for tensor in layout)
    found = []
    for site in sites:
        for part in ("k", "v"):
            rows = [t.name for fixed in ("0", "") for t in layout if (t.site, t.part) == (site, f"{part}{fixed}")]
            found.append(torch.cat([values[name] for name in rows]))
    return {_ROWS: torch.cat(found, dim=1)}


def _unpack(stored: Values, layout: Sequence[TensorSpec], module: Callable[..., str]) -> Values:
    sites = list(dict.fromkeys(tensor.site for tensor in layout))
    pieces = stored[_ROWS].chunk(2 * len(sites), dim=1)
    found: dict[str, Tensor] = {}
    for tensor in layout:
        rows = pieces[2 * sites.index(tensor.site) + tensor.part.startswith("v")]
        fixed = len(rows) - tensor.shape[0]
        found[tensor.name] = rows[: tensor.shape[0]] if tensor.part.endswith("0") else rows[max(fixed, 0) :]
    return found


_LENGTH: dict[str, tuple[str, object]] = {"length": ("num_virtual_tokens", 20)}
PEFT = (
    Peft(
        kind="PREFIX_TUNING",
        method="prefix",
        names=_LENGTH,
        reads=("encoder_hidden_size",),
        idle={"prefix_projection": None, "init_weights": None},  # its files hold what the network made
        sides={},
        layered=False,
        packed=Packed(_pack, _unpack),
    ),
    Peft(
        kind="PREFIX_TUNING",
        method="prefix-mlp",
        names=_LENGTH | {"hidden": ("encoder_hidden_size", 512)},
        fixed={"prefix_projection": True},
        sides={},
        layered=False,
        only="job",
    ),
    Peft(
        kind="CARTRIDGE",
        method="cartridge",
        names=_LENGTH | {"frozen": ("num_frozen_tokens", 1)},
        sides={},
        layered=False,
        packed=Packed(_pack, _unpack),
    ),
)

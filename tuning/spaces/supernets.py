"""The spaces of elastic supernets: NOAH's and neural low-rank adapter search's; and LoRA's rank site by site."""

from __future__ import annotations

from collections.abc import Sequence

from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import Group, Rates, Searched, Space, Term, count, evenly, rates
from polygraft.tuning.spaces.autopeft import halved
from polygraft.tuning.spaces.feasible import checked
from polygraft.tuning.spaces.parameters import Whole

NOAH_SIZES = (5, 10, 50, 100)
NLS_RANKS = (32, 24, 16)
NOAH_DEPTHS = 4  # quarters of the layers
LORA_SITES = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")


def noah(
    shape: ModelShape,
    *,
    sizes: Sequence[int] = NOAH_SIZES,
    depths: int = NOAH_DEPTHS,
    learning_rate: Rates | None = None,
    most: int | None = None,
) -> Space:
    """NOAH's space (Zhang et al. 2024, arXiv 2206.04673): LoRA, adapter and prompt, each in the layers up to a depth of
    its own, and of a size there: LoRA and adapter of one in every group of layers, the prompt of one in all.

    The prompt is a prefix, which has one length in all layers, where the paper's has one a layer; there are as many
    groups of layers as depths, where the paper has sizes for every layer. Raises SpecError.
    """
    groups = evenly(shape.layers, depths)
    terms: list[Term] = []
    for method, argument, fixed in (("lora", "r", ()), ("serial", "size", (("at", "ffn.out"),))):
        for number, group in enumerate(groups):
            when = (f"{method}.depth", tuple(range(number + 1, depths + 1)))
            searched = (Searched(argument, tuple(sizes)),)
            terms.append(Term(f"{method}_{group[0]}_{group[1]}", method, searched, fixed, group, when=when))
    for depth in range(1, depths + 1):
        group = (0, groups[depth - 1][1])
        searched = (Searched("length", tuple(sizes)),)
        terms.append(Term(f"prefix_0_{group[1]}", "prefix", searched, (), group, when=("prefix.depth", (depth,))))
    switches = tuple(Whole(f"{method}.depth", 0, depths) for method in ("lora", "serial", "prefix"))
    rate = learning_rate or rates(("lora", "serial", "prefix"))
    return checked(Space(shape, tuple(terms), rate, switches=switches, most=most))


def nls(
    shape: ModelShape,
    *,
    ranks: Sequence[int] = NLS_RANKS,
    groups: int | None = None,
    at: str = "linear",
    learning_rate: Rates | None = None,
    most: int | None = None,
) -> Space:
    """LoRA with one rank for all sites of a group of layers, of a short list (neural low-rank adapter search: LoNAS,
    Munoz et al., LREC-COLING 2024; Shears, arXiv 2404.10934). `groups`: one a layer when not given.
    """
    terms = tuple(
        _lora(f"r_{a}_{b}", tuple(ranks), at, (a, b)) for a, b in evenly(shape.layers, groups or shape.layers)
    )
    return checked(Space(shape, terms, learning_rate or rates(("lora",)), most=most))


def lora_ranks(
    shape: ModelShape,
    *,
    largest: int = 32,
    groups: int = 1,
    learning_rate: Rates | None = None,
    most: int | None = None,
) -> Space:
    """LoRA's rank at every kind of projection, or none there, in every group of layers (what AutoLoRA learns by
    gradients, Zhang et al. 2024, arXiv 2403.09113). Raises SpecError."""
    terms = [
        _lora(f"{site}_{group[0]}_{group[1]}" if groups > 1 else site, halved(largest), site, group, off=True)
        for group in evenly(shape.layers, groups)
        for site in LORA_SITES
        if _has(site, shape)
    ]
    return checked(Space(shape, tuple(terms), learning_rate or rates(("lora",)), most=most))


def _lora(name: str, ranks: tuple[int, ...], at: str, group: Group, *, off: bool = False) -> Term:
    return Term(name, "lora", (Searched("r", ranks),), (("at", at),), group, off)


def _has(site: str, shape: ModelShape) -> bool:
    try:
        return count(f"lora(r=1, at={site})", shape) > 0
    except SpecError:
        return False

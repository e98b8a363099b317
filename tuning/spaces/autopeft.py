"""AutoPEFT's space (Zhou et al. 2024, arXiv 2301.12132, section 3.1)."""

from __future__ import annotations

from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import Rates, Searched, Space, Term, evenly, rates
from polygraft.tuning.spaces.feasible import checked

MOST_BITS = 24  # deeper backbones are masked in groups of layers
METHODS = (("serial", "size"), ("parallel", "size"), ("prefix", "length"))


def autopeft(
    shape: ModelShape,
    *,
    groups: int | None = None,
    largest: int | None = None,
    longest: int | None = None,
    learning_rate: Rates | None = None,
    most: int | None = None,
) -> Space:
    """AutoPEFT's space and a learning rate: serial x parallel x prefix sizes x one mask of layers that all three share.

    As published: sizes are the hidden size halved again and again, down to 1 and off, and each layer has its bit; the
    paper trains all at one learning rate. `largest` and `longest` cap the adapters and the prefix instead; `groups` is
    the number of bits, at most one a layer (default: one each, up to MOST_BITS). Raises SpecError.
    """
    bits = min(shape.layers, MOST_BITS) if groups is None else groups
    caps = (largest, largest, longest)
    terms = tuple(
        Term(method, method, (Searched(argument, halved(shape.hidden if cap is None else cap)),), off=True)
        for (method, argument), cap in zip(METHODS, caps, strict=True)
    )
    mask = evenly(shape.layers, bits)
    return checked(Space(shape, terms, learning_rate or rates(name for name, _ in METHODS), mask, most=most))


def halved(largest: int) -> tuple[int, ...]:
    """`largest`, its half, ... down to 1. Raises SpecError."""
    if largest < 1:
        raise SpecError(f"largest: {largest} is not a size; give at least 1")
    return tuple(largest >> k for k in range(largest.bit_length()))

"""Prefix tuning without the MLP (p-tuning v2): trained keys and values before every layer's own (Li & Liang 2021; Liu
et al. 2022)."""

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import KV, Slot


def prefix(length: int = 10) -> tuple[Slot, ...]:
    return (KV(length=length),)


METHODS = (Method("prefix", "arXiv 2101.00190", 5e-3, prefix, aliases=("p-tuning-v2",)),)

"""AutoPEFT's unions: a serial and a parallel adapter of the feed-forward and a prefix, each of a size of its own or off
(Zhou et al. 2024, arXiv 2301.12132, section 3.1). The layers that have them are those after `@`; `tuning/space.py` is
the space of all."""

from polygraft.grafts.methods.additive.adapters import parallel
from polygraft.grafts.methods.additive.adapters import serial as serial_adapter
from polygraft.grafts.methods.additive.prefix import prefix as prefix_rows
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Slot, SpecError


def autopeft(serial: int = 48, beside: int = 48, prefix: int = 8) -> tuple[Slot, ...]:
    """Sizes of the serial adapter, the parallel one (`beside`) and the prefix; 0 leaves one out."""
    if not (serial or beside or prefix):
        raise SpecError("peft: autopeft: all three sizes are 0, so nothing would be trained; give one of them")
    return (
        *(serial_adapter(serial, act="relu", at="ffn.out") if serial else ()),
        *(parallel(beside) if beside else ()),
        *(prefix_rows(prefix) if prefix else ()),
    )


METHODS = (Method("autopeft", "arXiv 2301.12132", 1e-3, autopeft),)

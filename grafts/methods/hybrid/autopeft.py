"""AutoPEFT's unions."""

from polygraft.grafts.methods.additive.adapters import parallel as parallel_adapter
from polygraft.grafts.methods.additive.adapters import serial as serial_adapter
from polygraft.grafts.methods.additive.prefix import prefix as prefix_rows
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.ranges import Rows, Width
from polygraft.grafts.spec import Slot, SpecError


def autopeft(serial: Width = 48, parallel: Width = 48, prefix: Rows = 8) -> tuple[Slot, ...]:
    """A serial and a parallel adapter of the feed-forward and a prefix, each of a size of its own or off, in the layers
    after `@`: a point of AutoPEFT's space (Zhou et al. 2024, arXiv 2301.12132, section 3.1).

    Sizes of the serial adapter, the parallel one and the prefix; 0 leaves one out.
    `tuning/spaces/autopeft.py` is the space of all, which `polygraft search` searches.

    Deviations: The paper makes the prefix by a network of 800 neurons; here its rows are free.

    Choose when: a search chose the sizes. By hand `mam` is the simpler union.
    """
    if not (serial or parallel or prefix):
        raise SpecError("peft: autopeft: all three sizes are 0, so nothing would be trained; give one of them")
    return (
        *(serial_adapter(serial, act="relu", at="ffn.out") if serial else ()),
        *(parallel_adapter(parallel) if parallel else ()),
        *(prefix_rows(prefix) if prefix else ()),
    )


METHODS = (Method("autopeft", "arXiv 2301.12132", 1e-3, autopeft),)

"""Supernets: grafts that are trained at all of their sizes at once (`grafts/elastic.py` draws and cuts them)."""

from polygraft.grafts.elastic import read_sizes
from polygraft.grafts.methods.declare import Hook, Method
from polygraft.grafts.spec import DeclRef, Slot, SpecError

DEPTHS = ("drawn", "all")
SIZES = "5|10|50|100"


def elastic(sizes: str = SIZES, groups: int = 4, depth: str = "drawn") -> tuple[Slot, ...]:
    """A way to train, written beside what is trained, `lora(r=100) + serial(100) + prefix(100) + elastic`: every step
    computes with a subnet drawn at random, which shares its tensors' first rows with all others (NOAH: Zhang et al.
    2024, arXiv 2206.04673, section 3.2). Grafts of its subnets start from it: `lora(r=5)@0-11 + from(of=supernet)`.

    `sizes` are those that are drawn for each method, in each of `groups` of layers, a prefix having one in all of them;
    none is larger than the method's own. With a `depth` that is `drawn` each method stands in the first groups alone,
    in 0 to all of them; with `all` it stands in all (LoNAS and Shears).

    Deviations: There are as many groups of layers as depths, where the paper has a size for every layer. What a subnet
    leaves out has the gradient 0, so that its moments fade and its last steps' momentum moves it.

    Choose when: many sizes are to be compared for the price of training one. The subnet that is chosen is trained again
    by itself.
    """
    read_sizes(sizes)
    if groups < 1:
        raise SpecError(f"peft: elastic.groups: {groups} is not a number of groups; give at least 1")
    if depth not in DEPTHS:
        raise SpecError(f"peft: elastic.depth: {depth!r} is unknown; choices: {', '.join(DEPTHS)}")
    return ()


def _hooks(sizes: str = SIZES, groups: int = 4, depth: str = "drawn") -> tuple[DeclRef, ...]:
    return (DeclRef("elastic", (("sizes", sizes), ("groups", groups), ("depth", depth))),)


METHODS = (Method("elastic", "arXiv 2206.04673", 5e-4, elastic, hooks=_hooks),)
HOOKS = (Hook("elastic", resized=True),)

"""The subnets of a supernet: drawn for a step, and cut out of its tensors. Torch-free.

A supernet is a union with the hook `elastic`. A subnet is a union of the same methods at smaller sizes and in fewer
layers; each of its tensors is the first rows of the supernet's tensor at the same place, so that a size has in
common with all larger ones what it is made of (weight entanglement; Zhang et al. 2024, arXiv 2206.04673).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import Term, terms, union
from polygraft.grafts.methods.registry import find, hook
from polygraft.grafts.sizes import HEAD, TensorSpec
from polygraft.grafts.spec import KV, Branch, DeclRef, GraftSpec, Slot, SpecError


def elastic(spec: GraftSpec) -> DeclRef | None:
    """The hook that makes a graft a supernet, if it has it."""
    return next((call for call in spec.hooks if hook(call.name).resized), None)


def check(spec: GraftSpec) -> None:
    """Raises SpecError for a supernet of methods that have no sizes to be cut to, or none as small as one that is
    drawn."""
    call = elastic(spec)
    if call is None:
        return
    if spec.head is not None:
        raise SpecError("peft: elastic: a classifier has no sizes that its head could follow; leave it out")
    if any(hook(one.name).forward_only for one in spec.hooks):
        raise SpecError("peft: elastic: a supernet is trained by a backward; leave out mezo")
    for slot in spec.slots:
        _kind(slot)
    smallest = min(read_sizes(str(call.keywords()["sizes"])))
    for member in _members(spec):
        name, own = _size(member)
        if own < smallest:
            raise SpecError(f"peft: elastic.sizes: none is as small as {member.name}'s {name} of {own}")


def read_sizes(text: str) -> tuple[int, ...]:
    """Raises SpecError for what is no list of sizes."""
    found = [one.strip() for one in text.split("|")]
    if not all(one.isdecimal() and len(one) < 7 and int(one) for one in found):
        raise SpecError(f"peft: elastic.sizes: {text[:60]!r} are not sizes; write 5|10|50|100")
    return tuple(map(int, found))


@lru_cache(maxsize=256)
def subnet(graft: BoundGraft, draw: int) -> BoundGraft:
    """The subnet of a supernet that a number draws; never an empty one. Raises SpecError as `check`."""
    check(graft.spec)
    attempt = 0
    while not (found := tuple(_drawn(graft, f"{draw}/{attempt}"))):
        attempt += 1
    return BoundGraft(union(found), graft.shape)


def cut(graft: BoundGraft, supernet: BoundGraft) -> Mapping[str, str]:
    """By the name of each tensor of a graft that of the supernet's whose first rows it is. Raises SpecError for one
    that the supernet does not have, or has twice, or not in that size. A head is none of them."""
    places: dict[object, TensorSpec] = {}
    for tensor in supernet.tensors:
        place = tensor.site, tensor.part, _kind(supernet.spec.slots[tensor.slot])
        if place in places:
            raise SpecError(f"peft: elastic: two of one kind at {tensor.site}; give one of the sum of their sizes")
        places[place] = tensor
    found: dict[str, str] = {}
    for tensor in graft.tensors:
        if tensor.slot == HEAD:
            continue  # it starts anew
        whole = places.get((tensor.site, tensor.part, _kind(graft.spec.slots[tensor.slot])))
        if whole is None or whole.shape[1:] != tensor.shape[1:] or whole.shape[0] < tensor.shape[0]:
            has = "nothing of the kind" if whole is None else f"{list(whole.shape)}"
            raise SpecError(f"of: at {tensor.site} it has {has}, not {tensor.part} {list(tensor.shape)}")
        found[tensor.name] = whole.name
    return found


def _drawn(graft: BoundGraft, seed: str) -> Iterator[Term]:
    """The methods of a subnet, each with its size and layers."""
    call = elastic(graft.spec)
    assert call is not None, "a graft without sizes to draw"
    said = call.keywords()
    groups = min(int(said["groups"]), graft.shape.layers)
    for number, member in enumerate(_members(graft.spec)):
        name, own = _size(member)
        sizes = [size for size in read_sizes(str(said["sizes"])) if size <= own]
        depth = groups if said["depth"] == "all" else _pick(groups + 1, seed, number)
        slots, _ = find(member.name).build(member.arguments)
        apart = not any(isinstance(slot, KV) for slot in slots)  # a graft has one prefix
        for group in range(depth) if apart else range(min(depth, 1)):
            first, last = (group, group + 1) if apart else (0, depth)
            layers = range(first * graft.shape.layers // groups, last * graft.shape.layers // groups)
            there = tuple(layer for layer in layers if member.layers is None or layer in member.layers)
            if there:
                size = sizes[_pick(len(sizes), seed, number, group)]
                yield Term(member.name, {**member.arguments, name: f"{size}"}, there)


def _members(spec: GraftSpec) -> list[Term]:
    return [term for term in terms(spec.method) if find(term.name).build(term.arguments)[0]]


def _size(member: Term) -> tuple[str, int]:
    """The argument that is a method's size, which is its first, and its value."""
    method = find(member.name)
    name = next(iter(method.arguments))
    return name, int(member.arguments.get(name, method.arguments[name].default))


def _kind(slot: Slot) -> Slot:
    """What slots have in common whose tensors are rows of one another. Raises SpecError for one that is no such."""
    plain = slot.form is None and not slot.frozen
    if plain and isinstance(slot, Branch) and slot.gate == "none":
        return replace(slot, at="", rank=1, scale=1.0, dropout=0.0, layers=None, start=None)
    if plain and isinstance(slot, KV) and slot.gate == "none":
        return replace(slot, at="", length=1, layers=None, start=None)
    raise SpecError(
        f"peft: elastic: a {slot.op} is not rows that can be left out; write lora, serial, parallel, prefix"
    )


def _pick(count: int, *seed: object) -> int:
    """One of so many, by a hash: no generator to save or restore."""
    words = sha256("/".join(map(str, seed)).encode()).digest()
    return int.from_bytes(words[:8], "big") % count

"""Whether a space has grafts at all: what its backbone refuses, and whether its limit leaves any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from polygraft.grafts.methods.ranges import Value
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import Searched, Space, Term, count, layer_text


def declared(method: str, shape: ModelShape, *, only: tuple[str, ...] | None = None) -> tuple[Searched, ...]:
    """What the method declares as searched (of it `only` these arguments), without the values that mean nothing on the
    backbone. Raises SpecError when nothing is left: the backbone refuses the method."""
    searched = {n: one for n, one in find(method).searched.items() if only is None or n in only}
    base = _base(method, shape)
    found: list[Searched] = []
    for name, one in searched.items():
        kept = tuple(value for value in one.values if _binds(method, base | {name: value}, shape))
        if not kept:
            values = ", ".join(map(str, one.values))
            raise SpecError(f"space: the backbone refuses {method} with any {name} of {values}")
        found.append(Searched(name, kept, one.ordered))
    return tuple(found)


def _base(method: str, shape: ModelShape) -> dict[str, Value]:
    """What must be said beside the method's name for it to mean something on the backbone: nothing, or one value of an
    argument whose default does not suit it. Raises SpecError with the backbone's reason where none helps."""
    if not _binds(method, {}, shape):
        for name, one in find(method).searched.items():
            for value in one.values:
                if _binds(method, {name: value}, shape):
                    return {name: value}
        count(method, shape)
    return {}


def checked(space: Space) -> Space:
    """The space, if every term of it means something on its backbone and its limit leaves at least one graft.

    Raises SpecError that names the term with the backbone's reason, or the limit with the smallest graft there is.
    """
    for term in space.terms:
        for _ in _values(term, space.shape):
            pass
    if space.most is not None and (smallest := _smallest(space)) > space.most:
        raise SpecError(
            f"most: no graft of the space has at most {space.most} trainable parameters; the smallest has {smallest}"
        )
    return space


def _values(term: Term, shape: ModelShape) -> Iterator[tuple[int, str]]:
    """(parameters, argument's text) of the term with each value of each of its arguments, the others at their first."""
    first = dict.fromkeys((one.argument for one in term.searched), 0)
    where = f"@{layer_text([term.layers])}" if term.layers else ""
    for one in term.searched or (None,):
        for index in range(len(one.values) if one else 1):
            text = term.written(first | ({one.argument: index} if one else {})) + where
            try:
                yield count(text, shape), text
            except SpecError as error:
                raise SpecError(f"space: the backbone refuses {text}: {error}") from None


def _smallest(space: Space) -> int:
    """Parameters of the smallest graft: the least of each term that is always there, or of one that need not be.

    The least of a term with several arguments is sought one argument at a time, which is right where each changes the
    number in one direction.
    """
    share = 1 if not space.groups else min(last - first + 1 for first, last in space.groups)
    always: list[int] = []
    sometimes: list[int] = []
    for term in space.terms:
        least = _least(term, space.shape)
        if space.groups and term.layers is None:
            layered = replace(term, layers=min(space.groups, key=lambda group: group[1] - group[0]))
            least = min(least, _least(layered, space.shape)) if share < space.shape.layers else least
        (sometimes if term.off or term.when else always).append(least)
    return sum(always) if always else min(sometimes)


def _least(term: Term, shape: ModelShape) -> int:
    """Parameters of the smallest graft of one term alone."""
    chosen: dict[str, int] = dict.fromkeys((one.argument for one in term.searched), 0)
    where = f"@{layer_text([term.layers])}" if term.layers else ""

    def parameters(name: str, index: int) -> int:
        try:
            return count(term.written(chosen | {name: index}) + where, shape)
        except SpecError:
            return 2**62  # not one of the space's grafts

    for one in term.searched:
        chosen[one.argument] = min(range(len(one.values)), key=lambda i, n=one.argument: (parameters(n, i), i))  # type: ignore[misc]
    return count(term.written(chosen) + where, shape)


def _binds(method: str, arguments: Mapping[str, Value], shape: ModelShape) -> bool:
    try:
        return count(f"{method}({', '.join(f'{name}={value}' for name, value in arguments.items())})", shape) > 0
    except SpecError:
        return False

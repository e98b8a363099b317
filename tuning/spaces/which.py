"""The space of the whole registry: which method, and its own arguments when it is that one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.registry import FAMILIES, find, methods
from polygraft.grafts.sites import ModelShape, mergeable
from polygraft.grafts.spec import GraftSpec, SpecError
from polygraft.tuning.space import RELATIVE, Rates, Space, Term
from polygraft.tuning.spaces.feasible import checked, declared
from polygraft.tuning.spaces.parameters import Choice


def which(  # noqa: PLR0913
    shape: ModelShape,
    *,
    only: Sequence[str] = (),
    family: str | None = None,
    merges: bool = False,
    quantised: bool = False,
    learning_rate: Rates = RELATIVE,
    most: int | None = None,
) -> Space:
    """One method of the registry and the arguments that it declares as searched; the learning rate is a factor on the
    method's own. `only` some methods, of one `family`, or such as merge into W.

    Left out of the whole registry is what the backbone refuses, what is made over other grafts, what only changes how
    others train, and what means something on a `quantised` backbone alone, if this one is not. Raises SpecError for one
    that is named in `only` and would be left out, with the reason.
    """
    if family is not None and family not in FAMILIES:
        raise SpecError(f"family: {family!r} is unknown; choices: {', '.join(FAMILIES)}")
    terms: list[Term] = []
    for name in only or methods():
        method = find(name)
        try:
            reason = _left_out(method, family, merges, quantised)
            if reason:
                raise SpecError(f"space: {method.name} {reason}")
            terms.append(Term(method.name, method.name, declared(method.name, shape), when=("method", (len(terms),))))
            checked(Space(shape, (terms[-1],), learning_rate))
        except SpecError:
            if only:
                raise
            terms = [term for term in terms if term.name != method.name]
    if not terms:
        raise SpecError("space: no method of the registry is left; ask for fewer things at once")
    switch = Choice("method", len(terms))
    return checked(Space(shape, tuple(terms), learning_rate, switches=(switch,), most=most))


def refusal(method: Method, *, quantised: bool, given: Collection[str] = ()) -> str | None:
    """Why no trial can be of the method with these arguments given, whatever their values."""
    slots, hooks = method.build({})
    if not slots:
        return "only changes how other methods train"
    if (GraftSpec(method.name, slots, hooks).sources or "of" in method.arguments) and "of" not in given:
        return "is made over other grafts"
    if method.quantised and not quantised:
        return "trains beside a quantised backbone, and this one is not"
    return None


def _left_out(method: Method, family: str | None, merges: bool, quantised: bool) -> str | None:
    """Why the method is none of the space."""
    if reason := refusal(method, quantised=quantised):
        return reason
    slots, hooks = method.build({})
    if family is not None and f".{family}." not in method.slots.__module__:
        return f"is not of the family {family}"
    if merges and not mergeable(GraftSpec(method.name, slots, hooks)):
        return "does not merge into W"
    return None

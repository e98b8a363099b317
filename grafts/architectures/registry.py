"""The architectures that the files of this folder declare, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from polygraft.grafts.architectures import __path__ as folder
from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.spec import SpecError

_OURS = ("declare", "registry", "refusals")


@cache
def architectures() -> Mapping[str, Architecture]:
    """All of them, in alphabetical order."""
    names = [found.name for found in iter_modules(folder) if found.name not in _OURS]
    declared = [one for name in names for one in import_module(f"{__package__}.{name}").ARCHITECTURES]
    table = {one.model_type: one for one in declared}
    assert len(table) == len(declared), "a model_type is declared twice"
    return dict(sorted(table.items()))


def architecture(model_type: str) -> Architecture:
    """Raises SpecError for a model_type without a table."""
    if model_type not in architectures():
        choices = ", ".join(architectures())
        raise SpecError(f"model_type: {model_type!r} has no site table; supported: {choices}")
    return architectures()[model_type]

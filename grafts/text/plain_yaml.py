"""YAML as people write it: PyYAML's safe types, but 1e-4 is a number and a date is text, as in YAML 1.2 and JSON."""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

# The core schema's floats (YAML 1.2.2, 10.3.2). PyYAML's own, of YAML 1.1, want a dot and the exponent's sign.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class YamlError(ValueError):
    """A file that cannot be read as YAML; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML keeps the last in silence."""

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(file: Path | Traversable) -> object:
    """What the file holds, None for nothing. Raises YamlError for one that cannot be opened, or is not YAML."""
    try:
        return load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(str(error)) from None


def load(text: str) -> object:
    """The value. Raises YamlError."""
    try:
        value: object = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or number that is none
        raise YamlError(" ".join(str(error).split())) from None
    return value

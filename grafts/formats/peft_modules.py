"""Which projections and norms a PEFT config means, and the config for given ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.formats.patterns import Patterns
from polygraft.grafts.methods.configs import names
from polygraft.grafts.methods.exchange import Config, Peft
from polygraft.grafts.sites import (
    EMBED_SITE,
    FINAL_SITE,
    LINEAR,
    NORMS,
    ModelShape,
    Site,
    gathered,
    model_path,
    module_path,
)
from polygraft.grafts.spec import Layers, SpecError

_Fields = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Modules with one config: our argument for where they are and the sites' names by it, in these layers (None:
    all)."""

    config: Config
    sides: Mapping[str, tuple[str, ...]]
    layers: Layers


def path(site: Site, shape: ModelShape) -> str:
    """The site's module in the model with its head, as PEFT's patterns see it."""
    table = architecture(shape.arch)
    return f"{table.backbone}.{table.embedding}".lstrip(".") if site.name == EMBED_SITE else model_path(site, shape)


def groups(layout: Peft, config: Config, shape: ModelShape, *, stored: bool) -> tuple[Group, ...]:
    """The modules that the config means, those together that it gives the same values in the same layers.

    Raises SpecError where it means none. What a folder's (`stored`) names and the backbone has not is passed over, as
    in PEFT: people name the modules of many models at once. A job's is refused.
    """
    (whole, (key, _)), *others = layout.sides.items()
    patterns = Patterns()
    found: list[tuple[Site, tuple[str, _Fields]]] = []
    for site in candidates(shape):
        place = path(site, shape)
        if _means(config, key, place, patterns) and not _left_out(config, place, patterns):
            side = next((ours for ours, (field, _) in others if _means(config, field, place, patterns)), whole)
            found.append((site, (side, tuple(values_at(layout, config, place, patterns)))))
    if not found or not stored:
        _all_mean_something(config, key, shape, patterns)
    if not found:
        raise SpecError(f"{key}: {repr(config.get(key))[:200]} means no module that is left; see exclude_modules")
    together: dict[tuple[_Fields, Layers], dict[str, tuple[str, ...]]] = {}
    for (side, values), those, layers in gathered(found, shape):
        together.setdefault((values, layers), dict.fromkeys(layout.sides, ()))[side] = those
    return tuple(Group({**config, **dict(values)}, sides, layers) for (values, layers), sides in together.items())


def targets(sites: Iterable[Site], shape: ModelShape, *, layered: bool) -> Mapping[str, object] | None:
    """The fields of a config that mean just these sites: names and numbers of layers where that is enough and the
    config can say them (`layered`), else a pattern. None where a site is but a part of a module."""
    table = architecture(shape.arch)
    layers: dict[str, list[int]] = {}
    for site in sorted(sites):
        if site.name in LINEAR and len(table.fused_with(site.name)) > 1:
            return None
        layers.setdefault(site.name, []).append(0 if site.name == FINAL_SITE else site.layer)
    layered = layered and not shape.encoder_layers  # PEFT's numbers are those of either stack
    every = list(range(shape.layers))
    one = next(iter(layers.values()))
    if FINAL_SITE not in layers and all(where == one for where in layers.values()) and (layered or one == every):
        listed = table.targets(layers)
        if listed is not None:
            chosen = {"layers_to_transform": None if one == every else one} if layered else {}
            return {"target_modules": list(listed), **chosen}
    return {"target_modules": pattern(sites, shape)}


def pattern(sites: Iterable[Site], shape: ModelShape, *, short: bool = False) -> str:
    """A regular expression for just these sites' modules, or for the `short` ends of their paths in the backbone."""
    by_end: dict[tuple[str, str], list[int]] = {}  # by the list of layers and the module's path in one
    for site in sorted(sites):
        stack = shape.stack(site.layer)
        place = ("", module_path(site, shape)) if site.name == FINAL_SITE else (stack.layers, stack.modules[site.name])
        by_end.setdefault(place, []).append(shape.within(site.layer))
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (layers, end), where in by_end.items():
        together.setdefault((layers, tuple(where) if layers else ()), []).append(re.escape(end))
    backbone, found = architecture(shape.arch).backbone, []
    front = "" if short or not backbone else f"{backbone}."
    for (layers, chosen), ends in together.items():
        if not layers:
            found += [re.escape(front) + end for end in ends]
        else:
            number = r"\d+" if len(chosen) == shape.depth(layers) else "|".join(map(str, chosen))
            found.append(rf"{re.escape(front + layers)}\.({number})\.({'|'.join(ends)})")
    return f"({'|'.join(found)})" if len(found) > 1 else found[0]


def numbers(sites: Sequence[Site], shape: ModelShape) -> Mapping[Site, int]:
    """Each site's place among the modules of the graft in the order in which transformers has them."""
    order = architecture(shape.arch).order
    ranked = sorted(sites, key=lambda site: (site.layer, order.index(site.name)))
    return {site: index for index, site in enumerate(ranked)}


def candidates(shape: ModelShape) -> Iterator[Site]:
    """All projections and norms of the backbone."""
    for layer in range(shape.layers):
        yield from (site for name in (*LINEAR, *NORMS) if shape.has(site := Site(layer, name)))


def _means(config: Config, key: str, place: str, patterns: Patterns) -> bool:
    """As PEFT's `check_target_module_exists`."""
    value = config.get(key)
    if value == "all-linear":
        return not any(word in place.rpartition(".")[2] for word in ("norm", "ln_", "LayerNorm"))
    if isinstance(value, str):
        return patterns.match(key, value, place) is not None
    listed = names(config, key)
    if place in listed or not any(f".{place}".endswith(f".{name}") for name in listed):
        return place in listed
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == [] or key != "target_modules":
        return True
    lists = [rf"(?:^|.*?\.){name}" for name in names(config, "layers_pattern")] or [r".*?\.[^.]*"]
    matches = (patterns.match("layers_pattern", rf"{one}\.(\d+)\..*", place) for one in lists)
    match = next((found for found in matches if found), None)
    layers = chosen if isinstance(chosen, list) else [chosen]
    return match is not None and int(match[1]) in layers


def _left_out(config: Config, place: str, patterns: Patterns) -> bool:
    saved = (rf"(^|.*\.){name}($|\..*)" for name in names(config, "modules_to_save"))
    if any(patterns.match("modules_to_save", one, place) for one in saved):
        return True
    value = config.get("exclude_modules")
    if isinstance(value, str):
        return patterns.match("exclude_modules", value, place) is not None
    return any(f".{place}".endswith(f".{name}") for name in names(config, "exclude_modules"))


def values_at(layout: Peft, config: Config, place: str, patterns: Patterns) -> Iterator[tuple[str, object]]:
    """The fields that a pattern gives the module another value of."""
    for field, changed in layout.patterns.items():
        given = config.get(field) or {}
        if not isinstance(given, Mapping):
            raise SpecError(f"{field}: {repr(given)[:200]} is not an object of module names and values")
        for name, value in given.items():
            if not isinstance(value, int | float):
                raise SpecError(f"{field}: {repr(value)[:200]} is not a number")
            if _plain(name) and not place.endswith(name.rpartition(".")[2]):
                continue  # far sooner than by the pattern, where there is one for each module
            if patterns.match(field, rf"(.*\.)?({name})", place):
                yield changed, value
                break


def _plain(name: str) -> bool:
    """Whether a pattern is letters, digits and points alone, and so ends as its last part does."""
    return name.replace(".", "").replace("_", "").isalnum()


def _all_mean_something(config: Config, key: str, shape: ModelShape, patterns: Patterns) -> None:
    """Raise SpecError for a name of the list, or a pattern, that means nothing here, and for a layer that is not."""
    chosen = config.get("layers_to_transform")
    for layer in [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]:
        if not isinstance(layer, int) or not 0 <= layer < shape.layers:
            raise SpecError(f"layers: {repr(layer)[:200]} is not a layer of this backbone; it has 0-{shape.layers - 1}")
    value = config.get(key)
    asked: list[object] = [value] if isinstance(value, str) or not value else list(names(config, key))
    for one in asked:
        alone: Config = {key: one if isinstance(value, str) or not value else [one]}
        if not any(_means(alone, key, path(site, shape), patterns) for site in candidates(shape)):
            known = ", ".join(architecture(shape.arch).modules)
            raise SpecError(f"{key}: {repr(one)[:200]} matches no site of {shape.arch}; sites: {known}")

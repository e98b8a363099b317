"""What a PEFT config means on a backbone, as a union of methods: one reading for folders and for jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.peft_extras import extra_terms, job_terms
from polygraft.grafts.formats.peft_head import without_head
from polygraft.grafts.formats.peft_modules import groups
from polygraft.grafts.grammar import Term, parse, terms, union
from polygraft.grafts.methods.configs import arguments, flat, is_config, layout_of, of_text
from polygraft.grafts.methods.exchange import Config, Peft
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import GraftSpec, Layers, SpecError

_NAME = re.compile(r"[\w.]+", re.ASCII)


def asked_for(text: str, shape: ModelShape, backbone_files: BackboneFiles, *, classifies: bool = False) -> GraftSpec:
    """The graft that a job asks for on a backbone: a union, or PEFT's config as a JSON object (adapter_config.json or
    its essential fields) with what it trains beside its method. Of a job that `classifies` a config may name the head,
    which is trained in any case.

    Raises SpecError for a field that is not read here and not at its default, for a module or layer that is not there,
    and for what no op of ours trains.
    """
    if not is_config(text):
        return parse(text)
    config = flat(of_text(text))
    if classifies:
        config = without_head(config)
    try:
        layout = layout_of(config, stored=False)
        own = own_graft(layout, _named(layout, config), shape, stored=False)
        bound = BoundGraft(own, shape)
        more = [*extra_terms(config, bound, backbone_files), *job_terms(layout, bound, backbone_files)]
    except FormatError as error:
        raise SpecError(str(error)) from None
    return union([*terms(own.method), *more]) if more else own


def own_graft(layout: Peft, config: Config, shape: ModelShape, *, stored: bool) -> GraftSpec:
    """The graft of the config's method without what it trains beside; that of a job (not `stored`) stands where our
    method does when the config does not say."""
    if not layout.sides:
        return union([_term(layout, config, {}, _topmost(layout, config, shape, stored), stored)])
    key, _ = next(iter(layout.sides.values()))
    chosen = None if stored else _layers(config)
    if not stored and not config.get(key):
        for field in (*layout.patterns, "exclude_modules", "layers_pattern", "modules_to_save"):
            if config.get(field):
                raise SpecError(f"{key}: is not given, and {field} {config[field]!r} is about some modules; name them")
        return union([_term(layout, config, {}, chosen, stored)])
    found = [
        _term(
            layout, group.config, {side: "|".join(those) for side, those in group.sides.items()}, group.layers, stored
        )
        for group in groups(layout, config, shape, stored=stored)
    ]
    if len(found) > 1 and (layout.shared or layout.packed is not None):
        raise SpecError(f"target_modules: {layout.kind} shares tensors between modules; name the same in every layer")
    return union(found)


def _named(layout: Peft, config: Config) -> Config:
    """A job's config with the modules that PEFT's class has by default, and one name as a list of it."""
    found = dict(config)
    for key, default in layout.sides.values():
        value = config.get(key)
        if value is None and default:
            found[key] = [*default]
        elif isinstance(value, str) and value != "all-linear" and _NAME.fullmatch(value):
            found[key] = [value]
    return found


def _topmost(layout: Peft, config: Config, shape: ModelShape, stored: bool) -> Layers:
    """The layers that a method without modules acts in, None for all."""
    count = config.get(layout.topmost) if layout.topmost is not None else None
    if layout.topmost is None or (count is None and not stored):
        return None
    if not (isinstance(count, int) and 1 <= count <= shape.layers):
        raise SpecError(f"{layout.topmost}: {count!r} is not one of the {shape.layers} layers")
    return tuple(range(shape.layers))[-count:] if count < shape.layers else None


def _layers(config: Config) -> Layers:
    layers = config.get("layers_to_transform")
    if layers is None:
        return None
    found = layers if isinstance(layers, list) else [layers]
    if not found or not all(type(layer) is int and layer >= 0 for layer in found):
        raise SpecError(f"layers_to_transform: {repr(layers)[:200]} is not a list of layer numbers")
    return tuple(found)


def _term(layout: Peft, config: Config, sides: Mapping[str, str], layers: Layers, stored: bool) -> Term:
    values = {**arguments(layout, config, stored=stored), **sides}
    return Term(layout.method, {name: str(value) for name, value in values.items()}, layers)

"""PEFT's configs as methods with arguments, and back, by what the methods' files declare (`exchange.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from polygraft.grafts.methods.exchange import TOKENS_FIELD, Config, Peft
from polygraft.grafts.methods.registry import layouts
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.plain_json import JsonError, load

# What PEFT writes beside the fields that make a graft: notes on its origin, the backbone's sizes and layout.
_NOTES = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ]
)
# Values at which fields of many configs mean nothing.
_PLAIN: Config = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
# Which modules of the backbone, and what of it was trained beside: read where the backbone is known.
_PLACES = ("layers_pattern", "exclude_modules", "modules_to_save")


LONGEST = 2000  # characters of what describes a graft


def is_config(text: str) -> bool:
    """Whether a description of a graft is a config as JSON, and not a union."""
    return text.lstrip().startswith("{")


def of_text(text: str) -> Config:
    """The config that a JSON object is; raises SpecError for text that is none."""
    if len(text) > LONGEST:
        raise SpecError(f"peft: {len(text)} characters; at most {LONGEST}")
    try:
        value = load(text)
    except JsonError as error:
        raise SpecError(f"peft: {error}") from None
    if not isinstance(value, dict):
        raise SpecError("peft: expected a JSON object with peft_type")
    return value


def check(config: Config) -> None:
    """Raise SpecError for a config that no job can have, whatever the backbone."""
    config = flat(config)
    arguments(layout_of(config, stored=False), config, stored=False)


def flat(config: Config) -> dict[str, object]:
    """The config with what a variant's own object says (`use_bdlora`) under keys with points, and true in its place."""
    found: dict[str, object] = {}
    for key, value in config.items():
        if key.startswith("use_") and isinstance(value, Mapping):
            found |= {key: True, **{f"{key}.{inner}": one for inner, one in value.items()}}
        else:
            found[key] = value
    return found


def layout_of(config: Config, *, stored: bool) -> Peft:
    """The declaration that the config means, of a folder (`stored`) or a job; raises SpecError with the choices."""
    kind = str(config.get("peft_type", "LORA")).upper()
    fit = [layout for layout in layouts() if layout.only != ("job" if stored else "folder")]
    found = [layout for layout in fit if layout.kind == kind]
    if not found:
        kinds = ", ".join(dict.fromkeys(layout.kind for layout in fit))
        raise SpecError(f"peft_type: {repr(kind)[:200]} is not supported here; choices: {kinds}")
    for layout in found:
        if all(_is(config.get(key), value) for key, value in layout.fixed.items()):
            return layout
    differ = {key: config.get(key) for layout in found for key in layout.fixed}
    raise SpecError(f"peft: {kind} with {str(differ)[:200]} is not read here")


def arguments(layout: Peft, config: Config, *, stored: bool) -> dict[str, object]:
    """Our arguments for the config, but for those that say where.

    Raises SpecError for a field that is not read and not at its default: it may change what the graft is. From a folder
    (`stored`) those that only mattered in training are passed over.
    """
    _check(layout, config, stored)
    named = {
        ours: config[theirs] if config.get(theirs) is not None else default
        for ours, (theirs, default) in layout.names.items()
    }
    return {**named, **layout.arguments(config)}


def described(layout: Peft, values: Mapping[str, object]) -> dict[str, object]:
    """PEFT's fields for all arguments of the method but those that say where."""
    named = {theirs: _number(values[ours]) for ours, (theirs, _) in layout.names.items()}
    made = {key: _number(value) for key, value in layout.fields(**values).items()}
    return {**layout.needs, **layout.fixed, **named, **made}


def names(config: Config, key: str) -> list[str]:
    """A field that is a list of module names; one name may stand alone."""
    value = config.get(key) or []
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else [str(value)]


def _check(layout: Peft, config: Config, stored: bool) -> None:
    read = {theirs for theirs, _ in layout.names.values()} | {*layout.reads, *layout.fixed, *layout.needs, *_NOTES}
    read |= {theirs for theirs, _ in layout.sides.values()} | ({"layers_to_transform"} if layout.layered else set())
    read |= {*layout.patterns, *(_PLACES if layout.sides else ()), *([TOKENS_FIELD] if layout.edits_tokens else ())}
    read |= {"bias"} if layout.sides and layout.biases else set()
    plain = {**_PLAIN, **layout.idle}
    if stored:
        read |= layout.idle.keys() - layout.harmless.keys()
    odd = {
        key: value
        for key, value in config.items()
        if value
        and key not in read
        and value != plain.get(key)
        and not (stored and value in layout.harmless.get(key, ()))
    }
    if odd:
        said = ", ".join(sorted(read - {*_NOTES, *_PLACES, *layout.idle}))
        raise SpecError(
            f"peft: {str(odd)[:200]} is not read for {layout.kind}, and may change what it is. Fields: {said}"
        )
    for key, value in layout.needs.items():
        if config.get(key, value) != value:
            raise SpecError(f"{key}: {config[key]!r} is not read for {layout.kind}; it takes {value!r}")


def _is(value: object, wished: object) -> bool:
    return bool(value) == wished if isinstance(wished, bool) else value == wished


def _number(value: object) -> object:
    """Whole numbers without a point, as people write them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""Read what users write for a graft: a union such as `prefix(10) + parallel(64)@0-5 + lora(r=4, at=attn.*)`, or a
PEFT config.

union := term ("+" term)*      term := method ["(" [argument ("," argument)*] ")"] ["@" layers]
argument := [key "="] value    layers := number | number "-" number, joined by ","
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from polygraft.grafts.methods.registry import find
from polygraft.grafts.spec import GraftSpec, Layers, Slot, SpecError

_TERM = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*(?:@([0-9,\- ]+))?\s*", re.ASCII)
_LIMIT = 2000


def parse(text: str) -> GraftSpec:
    """The graft that `text` describes: a union, or a JSON object with PEFT's fields. Raises SpecError with the
    choices."""
    if len(text) > _LIMIT:
        raise SpecError(f"peft: {len(text)} characters; at most {_LIMIT}")
    if text.lstrip().startswith("{"):
        return from_peft_config(_object(text))
    slots: list[Slot] = []
    position = 0
    while True:
        term = _TERM.match(text, position)
        if term is None:
            raise SpecError(f"peft: cannot read {text[position:]!r}; write method(arguments)@layers joined by +")
        slots += _term(term[1], term[2] or "", term[3])
        position = term.end()
        if position == len(text):
            return GraftSpec(text.strip(), tuple(slots))
        if text[position] != "+":
            raise SpecError(f"peft: cannot read {text[position:]!r} after {text[:position].strip()!r}; expected +")
        position += 1


def from_peft_config(config: Mapping[str, object]) -> GraftSpec:
    """The graft of a PEFT config (adapter_config.json or its essential fields): LORA with or without DoRA, IA3,
    PREFIX_TUNING."""
    kind = str(config.get("peft_type", "LORA")).upper()
    targets = config.get("target_modules")
    at = "|".join(sorted(map(str, targets))) if isinstance(targets, list | tuple | set) else targets
    unsupported = {key: config[key] for key in _REFUSED if config.get(key)}
    if unsupported:
        raise SpecError(f"peft: {unsupported} is not supported; remove it")
    arguments: dict[str, object] = {}
    if kind == "LORA":
        rank = config.get("r", 8)
        alpha = config.get("lora_alpha", 8)
        arguments = {"r": rank, "alpha": alpha, "at": at or "linear", "dropout": config.get("lora_dropout") or 0.0}
        name = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    elif kind == "IA3":
        name = "ia3"
        arguments = (
            {"at": "|".join(sorted(set(map(str, targets)) - set(_strings(config, "feedforward_modules"))))}
            if targets
            else {}
        )  # type: ignore[arg-type]
    elif kind == "PREFIX_TUNING":
        name, arguments = "prefix", {"length": config.get("num_virtual_tokens", 20)}
    else:
        raise SpecError(f"peft_type: {kind!r} is not supported here; choices: LORA, IA3, PREFIX_TUNING")
    method = find(name)
    layers = config.get("layers_to_transform")
    chosen = None if layers is None else tuple(layers) if isinstance(layers, list | tuple) else (int(str(layers)),)
    text = f"{method.name}({', '.join(f'{key}={value}' for key, value in arguments.items() if value is not None)})"
    return GraftSpec(text, _at_layers(method.build({key: str(value) for key, value in arguments.items()}), chosen))


def learning_rate(text: str) -> float:
    """The rate to start from for what `text` describes: the smallest of its methods' own."""
    if text.lstrip().startswith("{"):
        text = from_peft_config(_object(text)).method
    names = re.findall(r"(?:^|\+)\s*([a-z][a-z0-9_-]*)", text)
    return min(find(name).learning_rate for name in names)


_REFUSED = ("modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "prefix_projection", "layer_replication")


def _strings(config: Mapping[str, object], key: str) -> list[str]:
    value = config.get(key) or []
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else [str(value)]


def _object(text: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"peft: not JSON at character {error.pos}: {error.msg}") from None
    if not isinstance(value, dict):
        raise SpecError("peft: expected a JSON object with peft_type")
    return value


def _term(name: str, inside: str, layers: str | None) -> tuple[Slot, ...]:
    method = find(name)
    arguments: dict[str, str] = {}
    for index, argument in enumerate(part.strip() for part in inside.split(",") if part.strip()):
        key, equals, value = argument.partition("=")
        if not equals:
            key, value = method.positional(index), argument
        if key.strip() in arguments:
            raise SpecError(f"peft: {name}: {key.strip()!r} is given twice")
        arguments[key.strip()] = value.strip()
    return _at_layers(method.build(arguments), _layer_list(layers))


def _at_layers(slots: tuple[Slot, ...], layers: Layers) -> tuple[Slot, ...]:
    return slots if layers is None else tuple(replace(slot, layers=layers) for slot in slots)


def _layer_list(text: str | None) -> Layers:
    if text is None:
        return None
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        if (
            not first.isdigit()
            or (dash and not last.isdigit())
            or (dash and int(last) < int(first))
            or int(last or 0) > 9999
        ):
            raise SpecError(f"layers: cannot read {part!r}; write 3 or 0-5, joined by commas")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)

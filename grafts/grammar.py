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
from math import sqrt

from polygraft.grafts.methods.registry import find
from polygraft.grafts.spec import Call, GraftSpec, Layers, Slot, SpecError

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
    hooks: list[Call] = []
    position = 0
    while True:
        term = _TERM.match(text, position)
        if term is None:
            raise SpecError(f"peft: cannot read {text[position:]!r}; write method(arguments)@layers joined by +")
        own, called = _term(term[1], term[2] or "", term[3])
        slots, hooks = [*slots, *own], [*hooks, *called]
        position = term.end()
        if position == len(text):
            return GraftSpec(text.strip(), tuple(slots), tuple(hooks))
        if text[position] != "+":
            raise SpecError(f"peft: cannot read {text[position:]!r} after {text[:position].strip()!r}; expected +")
        position += 1


def from_peft_config(config: Mapping[str, object]) -> GraftSpec:
    """The graft of a PEFT config (adapter_config.json or its essential fields): LORA with or without DoRA, IA3,
    PREFIX_TUNING.

    Raises SpecError for a field that is not read here and not at its default: it may change what the graft is.
    """
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in _READ:
        raise SpecError(f"peft_type: {kind!r} is not supported here; choices: {', '.join(_READ)}")
    plain = {**_DEFAULTS, **{key: config.get(key) for key in (*_READ[kind], *_NOTES)}}
    odd = {key: value for key, value in config.items() if value and value != plain.get(key)}
    if odd:
        raise SpecError(f"peft: {str(odd)[:200]} is not read for {kind}; remove it. Fields: {', '.join(_READ[kind])}")
    name, arguments = _ARGUMENTS[kind](config)
    chosen = _chosen(config.get("layers_to_transform"))
    text = f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"
    text += "" if chosen is None else f"@{','.join(map(str, chosen))}"
    slots, hooks = find(name).build({key: str(value) for key, value in arguments.items()})
    return GraftSpec(text, _at_layers(slots, chosen), hooks)


def learning_rate(text: str) -> float:
    """The rate to start from for what `text` describes: the smallest of its methods' own."""
    if text.lstrip().startswith("{"):
        text = from_peft_config(_object(text)).method
    names = re.findall(r"(?:^|\+)\s*([a-z][a-z0-9_-]*)", text)
    return min(find(name).learning_rate for name in names)


# What PEFT writes beside the fields that make a graft: notes on its origin, the backbone's sizes and layout.
_NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",
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
)
_DEFAULTS: Mapping[str, object] = {
    "bias": "none",
    "init_ia3_weights": True,
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
_READ: Mapping[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_dora", "use_rslora"),
    "IA3": ("target_modules", "feedforward_modules"),
    "PREFIX_TUNING": ("num_virtual_tokens",),
}


def _lora(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    targets = "|".join(sorted(_strings(config, "target_modules")))
    stable = bool(config.get("use_rslora"))
    if config.get("use_dora") and stable and isinstance(rank, int) and isinstance(alpha, int | float):
        alpha = alpha * sqrt(max(rank, 1))  # alpha / sqrt(r) is this over r, which our dora divides by
    name = "dora" if config.get("use_dora") else "rslora" if stable else "lora"
    dropout = config.get("lora_dropout") or 0.0
    return name, {"r": rank, "alpha": alpha, "at": targets or "linear", "dropout": dropout}


def _ia3(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    targets = set(_strings(config, "target_modules"))
    before = config.get("feedforward_modules")
    scaled = {"down_proj"} if before is None else set(_strings(config, "feedforward_modules"))
    if not targets:
        return "ia3", {}
    return "ia3", {"at": "|".join(sorted(targets - scaled)), "feedforward": "|".join(sorted(targets & scaled))}


def _prefix(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    return "prefix", {"length": config.get("num_virtual_tokens", 20)}


_ARGUMENTS = {"LORA": _lora, "IA3": _ia3, "PREFIX_TUNING": _prefix}


def _strings(config: Mapping[str, object], key: str) -> list[str]:
    value = config.get(key) or []
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else [str(value)]


def _chosen(layers: object) -> Layers:
    if layers is None:
        return None
    found = layers if isinstance(layers, list | tuple) else [layers]
    if not found or not all(isinstance(layer, int) for layer in found):
        raise SpecError(f"layers_to_transform: {layers!r} is not a list of layer numbers")
    return tuple(found)


def _object(text: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"peft: not JSON at character {error.pos}: {error.msg}") from None
    if not isinstance(value, dict):
        raise SpecError("peft: expected a JSON object with peft_type")
    return value


def _term(name: str, inside: str, layers: str | None) -> tuple[tuple[Slot, ...], tuple[Call, ...]]:
    method = find(name)
    arguments: dict[str, str] = {}
    for index, argument in enumerate(part.strip() for part in inside.split(",") if part.strip()):
        key, equals, value = argument.partition("=")
        if not equals:
            key, value = method.positional(index), argument
        if key.strip() in arguments:
            raise SpecError(f"peft: {name}: {key.strip()!r} is given twice")
        arguments[key.strip()] = value.strip()
    slots, hooks = method.build(arguments)
    return _at_layers(slots, _layer_list(layers)), hooks


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

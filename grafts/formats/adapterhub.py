"""The folder that AdapterHub's library `adapters` writes, `adapter_config.json` and `adapter.safetensors`, for
bottleneck adapters and prefixes on Llama, Mistral, GPT-2, BERT and RoBERTa.

A bottleneck reads the sublayer's output h, its input x (`is_parallel`), or h + x on the residual stream
(`original_ln_before` where the model's norms stand before the sublayers): y = h + s (W_up act(W_down . + a) + b). Its
prefix rows have no positions of their own, as here, but the prompt starts at position 0 and here after the prefix: keys
are turned by the prefix's length, so that all differences between positions are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError, check, sized
from polygraft.grafts.formats.files import tensors
from polygraft.grafts.formats.peft import CONFIG, config_of
from polygraft.grafts.grammar import Term, union
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import GraftSpec, SpecError

WEIGHTS = "adapter.safetensors"
Config = Mapping[str, object]
# Where the library has its modules, for the output of attention and of the feed-forward.
_PLACES = {
    "llama": ("attention_adapters", "output_adapters"),
    "mistral": ("attention_adapters", "output_adapters"),
    "gpt2": ("attention_adapters", "output_adapters"),
    "bert": ("attention.output", "output"),
    "roberta": ("attention.output", "output"),
}
_ACTS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}
# Values without which a bottleneck is another function; what is not here is about training alone.
_BOTTLENECK: Config = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
}
_PREFIX: Config = {"use_gating": False}
_ROTARY = ("llama", "mistral")


@dataclass(frozen=True, slots=True)
class _Bottleneck:
    """One adapter of one layer in the file."""

    layer: int
    down: Tensor
    a: Tensor
    up: Tensor
    b: Tensor


def wrote(config: Config) -> bool:
    """Whether it is a config of the library's."""
    return isinstance(config.get("config"), Mapping) and "peft_type" not in config


def load(folder: Path, backbone_files: BackboneFiles) -> tuple[BoundGraft, dict[str, Tensor]]:
    """The graft of the folder, float32, by our names.

    Raises FormatError for pickled weights, a config that means something else, a tensor that is missing or unknown.
    """
    whole = config_of(folder)
    config, name, shape = whole.get("config"), whole.get("name"), backbone_files.shape
    if not isinstance(config, Mapping) or not isinstance(name, str):
        raise FormatError(f"{folder.name}/{CONFIG}: holds no config and name of an adapter")
    try:
        stored = tensors(folder, WEIGHTS)
        match config.get("architecture"):
            case None:
                spec, values = _bottlenecks(config, name, stored, shape)
            case "prefix_tuning":
                spec, values = _prefix(config, name, stored, backbone_files)
            case other:
                raise SpecError(f"architecture: {other!r} is not read; choices: null (bottlenecks), prefix_tuning")
        graft = BoundGraft(spec, shape)
    except SpecError as error:
        raise FormatError(f"{folder.name}: {error}") from None
    values = {key: value.to(torch.float32).contiguous().clone() for key, value in values.items()}
    check(graft, values)
    return graft, values


def _bottlenecks(
    config: Config, name: str, stored: Mapping[str, Tensor], shape: ModelShape
) -> tuple[GraftSpec, dict[str, Tensor]]:
    _only(config, _BOTTLENECK)
    act = _ACTS.get(str(config.get("non_linearity")).lower())
    if act is None:
        raise SpecError(f"non_linearity: {config.get('non_linearity')!r} is not here; choices: {', '.join(_ACTS)}")
    if shape.arch not in _PLACES:
        raise SpecError(f"adapters on {shape.arch} are not read; choices: {', '.join(_PLACES)}")
    read: set[str] = set()
    terms: list[Term] = []
    found: list[_Bottleneck] = []
    for side, place in zip(("mh_adapter", "output_adapter"), _PLACES[shape.arch], strict=True):
        if not config.get(side):
            continue
        method, at = _method(config, side, shape)
        for one in _stored(config, name, place, stored, shape, read):
            said = {"size": str(len(one.down)), "act": act, "at": at, "bias": "1"}
            terms.append(Term(method, said | ({"scale": "1"} if method == "parallel" else {}), (one.layer,)))
            found.append(one)
    if read != stored.keys() or not found:
        odd = sorted(read ^ stored.keys())
        raise FormatError(f"{WEIGHTS}: {odd[:3]} are missing or unknown ({len(odd)} in all)")
    spec = union(terms)
    values: dict[str, Tensor] = {}
    for number, (one, term) in enumerate(zip(found, terms, strict=True)):
        branch, shift = (f"{2 * number + i}.{one.layer}.{term.arguments['at']}" for i in (0, 1))
        values |= {f"{branch}.A": one.down, f"{branch}.B": one.up.T, f"{branch}.a": one.a[:, None], f"{shift}.b": one.b}
    return spec, values


def _method(config: Config, side: str, shape: ModelShape) -> tuple[str, str]:
    """Our method for the adapters on a side, and where it stands."""
    sublayer = "attn.out" if side == "mh_adapter" else "ffn.out"
    before = shape.causal  # the models' norms stand before their sublayers, and the library's adapters get none
    if config.get("is_parallel"):
        if before:
            raise SpecError(f"is_parallel: true reads {shape.arch}'s residual stream before its norm; no op does")
        return "parallel", sublayer
    if not config.get("original_ln_before"):
        return "serial", sublayer
    if not before or side == "mh_adapter" or config.get("residual_before_ln") is not True:
        raise SpecError(f"original_ln_before: true with {side} reads {shape.arch}'s stream inside a layer")
    return "serial", "block.out"


def _stored(
    config: Config, name: str, place: str, stored: Mapping[str, Tensor], shape: ModelShape, read: set[str]
) -> Iterator[_Bottleneck]:
    """The adapters at one place of all layers, with their scale in their second projection."""
    table = architecture(shape.arch)
    for layer in _layers(config, shape):
        stem = f"{table.layers}.{layer}.{place}.adapters.{name}."

        def tensor(end: str, *shapes: tuple[int, ...], stem: str = stem) -> Tensor:
            keys = [key for key in stored if f".{key}".endswith(f".{stem}{end}")]
            if len(keys) != 1:
                raise FormatError(f"{WEIGHTS}: {stem}{end} is missing")
            read.add(keys[0])
            value = stored[keys[0]].float()
            return sized(keys[0], value, *shapes) if shapes else value

        scaling = config.get("scaling", 1.0)
        r, d = tensor("adapter_down.0.bias").numel(), shape.hidden
        learned = None if isinstance(scaling, int | float) else tensor("scaling", (1,), (d,))
        scale = torch.tensor(scaling, dtype=torch.float32) if learned is None else learned
        up, b = tensor("adapter_up.weight", (d, r)), tensor("adapter_up.bias", (d,))
        down, a = tensor("adapter_down.0.weight", (r, d)), tensor("adapter_down.0.bias", (r,))
        yield _Bottleneck(layer, down, a, scale.view(-1, 1) * up, scale * b)


def _prefix(
    config: Config, name: str, stored: Mapping[str, Tensor], backbone_files: BackboneFiles
) -> tuple[GraftSpec, dict[str, Tensor]]:
    _only(config, _PREFIX)
    shape = backbone_files.shape
    if shape.arch not in _ROTARY:
        raise SpecError(f"prefix_tuning on {shape.arch}: its prompt would start at another position than here")
    layers = _layers(config, shape)
    pattern = re.compile(rf"(?:.*\.)?prefix_tunings\.{re.escape(name)}\.self_prefix\.(.*)")
    parts = {match[1]: value.float() for key, value in stored.items() if (match := pattern.fullmatch(key)) is not None}
    length = config.get("prefix_length")
    wanted = {"control_trans"} if config.get("flat") else {"wte.weight", *_LINEARS}
    if len(parts) != len(stored) or parts.keys() != wanted or not isinstance(length, int):
        raise FormatError(f"{WEIGHTS}: {sorted(stored)[:3]} are not the {sorted(wanted)} of prefixes called {name!r}")
    width = 2 * len(layers) * shape.kv_width
    rows = parts["control_trans"] if config.get("flat") else _network(config, parts, (length, shape.hidden, width))
    if rows.numel() != length * width:
        raise FormatError(f"{WEIGHTS}: {rows.numel()} numbers are not {length} keys and values of {len(layers)} layers")
    pieces = rows.reshape(length, 2 * len(layers), shape.kv_heads, shape.head_dim).unbind(1)
    spec = union([Term("prefix", {"length": str(length)}, layers if len(layers) < shape.layers else None)])
    values: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        values[f"0.{layer}.kv.k"] = _turned(pieces[2 * index], length, backbone_files).flatten(1)
        values[f"0.{layer}.kv.v"] = pieces[2 * index + 1].flatten(1)
    return spec, values


_LINEARS = tuple(f"control_trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias"))


def _network(config: Config, parts: Mapping[str, Tensor], sizes: tuple[int, int, int]) -> Tensor:
    """W2 act(W1 E + b1) + b2, of E's rows and columns and W2's rows."""
    if config.get("non_linearity") != "tanh":
        raise SpecError(f"non_linearity: {config.get('non_linearity')!r} of a prefix is not 'tanh'")
    (length, d, width), m = sizes, parts[_LINEARS[1]].numel()
    shapes = ((m, d), (m,), (width, m), (width,))
    W1, b1, W2, b2 = (sized(key, parts[key], size) for key, size in zip(_LINEARS, shapes, strict=True))
    return torch.tanh(sized("wte.weight", parts["wte.weight"], (length, d)) @ W1.T + b1) @ W2.T + b2


def _turned(k: Tensor, by: int, backbone_files: BackboneFiles) -> Tensor:
    """Keys [p, heads, d] as the model's rotary embedding turns those at position `by`."""
    from transformers import CONFIG_MAPPING  # here, since few folders need it, and it is half of what a reader imports
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: Any = CONFIG_MAPPING[str(backbone_files.config["model_type"])].from_dict(dict(backbone_files.config))
    frequencies: Tensor = LlamaRotaryEmbedding(config).inv_freq  # the same for all of _ROTARY
    angles = (by * frequencies.double()).repeat(2)
    one, other = k.double().chunk(2, dim=-1)
    return (k * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()).float()


def _layers(config: Config, shape: ModelShape) -> tuple[int, ...]:
    left_out = config.get("leave_out") or []
    if not isinstance(left_out, list):
        raise SpecError(f"leave_out: {left_out!r} is not a list of layers")
    return tuple(layer for layer in range(shape.layers) if layer not in left_out)


def _only(config: Config, plain: Config) -> None:
    for key, value in plain.items():
        if (config.get(key, value) or None) != (value or None):
            raise SpecError(f"{key}: {config[key]!r} is not read for this adapter; it takes {value!r}")

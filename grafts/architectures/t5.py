"""T5: an encoder and a decoder, whose layers count on after the encoder's and attend to its last states, too.

Relative positions bias the scores of self-attention. A gated feed-forward (T5 1.1, Flan-T5) has another module, too:
there are two tables. `cross.k` and `cross.v` read the encoder's rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from polygraft.grafts.architectures.declare import Architecture, Config

_FEEDS = {
    "norm.1": ("attn.q", "attn.k", "attn.v"),
    "norm.2": ("ffn.gate", "ffn.up"),
    "norm.cross": ("cross.q",),
}
_FIELDS = {
    "encoder_layers": "num_layers",
    "layers": "num_decoder_layers",
    "hidden": "d_model",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "ffn": "d_ff",
}
_ATTENTION = tuple(f"{kind}.{part}" for kind in ("attn", "cross") for part in "qkvo")
_ORDER = (*_ATTENTION, "ffn.gate", "ffn.up", "ffn.down")
_PLAIN = {"ffn.up": "wi", "ffn.down": "wo"}
_GATED = {"ffn.gate": "wi_0", "ffn.up": "wi_1", "ffn.down": "wo"}


def _attention(kind: str, layer: int, name: str) -> dict[str, str]:
    own = {f"{kind}.{part}": f"layer.{layer}.{name}.{part}" for part in "qkvo"}
    return {**own, f"{kind}.out": f"layer.{layer}.{name}"}


def _feedforward(layer: int, parts: Mapping[str, str]) -> dict[str, str]:
    path = f"layer.{layer}.DenseReluDense"
    return {
        **{site: f"{path}.{name}" for site, name in parts.items()},
        "ffn.out": path,
        "norm.2": f"layer.{layer}.layer_norm",
    }


def _table(name: str, parts: Mapping[str, str]) -> Architecture:
    attention = {**_attention("attn", 0, "SelfAttention"), "norm.1": "layer.0.layer_norm"}
    crossing = {**_attention("cross", 1, "EncDecAttention"), "norm.cross": "layer.1.layer_norm"}
    encoder = Architecture(
        model_type=name,
        layers="encoder.block",
        final="encoder.final_layer_norm",
        modules={**attention, **_feedforward(1, parts)},
        causal=False,
        feeds=_FEEDS,
    )
    return Architecture(
        model_type=name,
        backbone="",
        layers="decoder.block",
        final="decoder.final_layer_norm",
        embedding="shared",
        modules={**attention, **crossing, **_feedforward(2, parts)},
        auto="AutoModelForSeq2SeqLM",
        feeds=_FEEDS,
        order=_ORDER,
        fields=_FIELDS,
        encoder=encoder,
        variant=_variant,
    )


def _variant(config: Config) -> str:
    return "t5.gated" if str(config.get("feed_forward_proj")).startswith("gated") else "t5"


ARCHITECTURES = (_table("t5", _PLAIN), _table("t5.gated", _GATED))

"""The reference backbone with its parts under Llama's module names, so that one oracle serves every architecture.

Every computation stays transformers' own: a projection moves, and where it stood a call to its new place is left. A
Conv1D becomes the linear of its transposed weight, a fused projection the linears of its rows. Written from the
forward functions of transformers, and not from our tables of sites, which it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Part(nn.Module):
    """A sublayer's name space; called with its input and what it adds to the residual sum, it returns the latter."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Call(nn.Module):
    """A module that is but a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.forward = function


def uniform(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, with `model.layers.0.self_attn.q_proj` and its like where an oracle looks for them."""
    kind = model.config.model_type
    if kind not in _LAYERS:
        return model  # Llama's names already
    path, arrange, outside = _LAYERS[kind]
    if not hasattr(model, "model"):
        model.model = nn.Module()
    for name, target in outside.items():
        parent, _, child = name.rpartition(".")
        weight = model.get_submodule(name).get_parameter("weight")
        _move(model.get_submodule(parent), child, model, f"model.{target}")
        model.get_submodule(name).weight = weight  # PEFT looks for embeddings by their weight
    if path == "model.layers":
        for layer in model.get_submodule(path).children():
            arrange(layer, layer, model.config.num_attention_heads)
        return model
    named = nn.ModuleList()
    for layers in map(model.get_submodule, path.split("|")):
        for index, layer in enumerate(layers.children()):
            into = _layer()
            arrange(layer, into, model.config.num_attention_heads)
            setattr(layers, str(index), _seen(layer, into))
            named.append(into)
    model.model.layers = named
    return model


def _layer() -> nn.Module:
    layer = Part()
    layer.self_attn, layer.mlp = Part(), Part()
    return layer


def _gpt2(layer: nn.Module, into: nn.Module, heads: int) -> None:
    attention, mlp = layer.get_submodule("attn"), layer.get_submodule("mlp")
    weight, bias = attention.get_parameter("c_attn.weight").T, attention.get_parameter("c_attn.bias")
    _split(attention, "c_attn", into, weight.chunk(3), bias.chunk(3), lambda parts: torch.cat([*parts], -1))
    for parent, name, target in (
        (attention, "c_proj", "self_attn.o_proj"),
        (mlp, "c_fc", "mlp.up_proj"),
        (mlp, "c_proj", "mlp.down_proj"),
    ):
        conv = parent.get_submodule(name)
        setattr(parent, name, _linear(conv.get_parameter("weight").T, conv.get_parameter("bias")))
        _move(parent, name, into, target)
    _norms(layer, into, "ln_1", "ln_2")
    _wrap(layer, "attn", into, "self_attn")
    _wrap(layer, "mlp", into, "mlp")


def _gpt_neox(layer: nn.Module, into: nn.Module, heads: int) -> None:
    attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
    weight, bias = (attention.get_parameter(f"query_key_value.{name}") for name in ("weight", "bias"))
    by_head = weight.view(heads, 3, -1, weight.shape[1]), bias.view(heads, 3, -1)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.unflatten(part, -1, (heads, -1)) for part in parts], -2).flatten(-3)

    rows = [by_head[0][:, i].flatten(0, 1) for i in range(3)], [by_head[1][:, i].flatten() for i in range(3)]
    _split(attention, "query_key_value", into, *rows, join)
    _move(attention, "dense", into, "self_attn.o_proj")
    _move(mlp, "dense_h_to_4h", into, "mlp.up_proj")
    _move(mlp, "dense_4h_to_h", into, "mlp.down_proj")
    _norms(layer, into, "input_layernorm", "post_attention_layernorm")
    _wrap(layer, "attention", into, "self_attn")
    _wrap(layer, "mlp", into, "mlp")


def _bert(layer: nn.Module, into: nn.Module, heads: int) -> None:
    inner = layer.get_submodule("attention.self")
    for name, target in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        _move(inner, name, into, f"self_attn.{target}")
    _move(layer.get_submodule("intermediate"), "dense", into, "mlp.up_proj")
    for path, part, target, norm in (
        ("attention.output", "self_attn", "o_proj", "input_layernorm"),
        ("output", "mlp", "down_proj", "post_attention_layernorm"),
    ):
        output = layer.get_submodule(path)
        setattr(into.get_submodule(part), target, output.get_submodule("dense"))
        setattr(into, norm, output.get_submodule("LayerNorm"))
        parent, _, child = path.rpartition(".")
        setattr(layer.get_submodule(parent), child, Call(_after_norm(into, part, target, norm)))


def _after_norm(into: nn.Module, part: str, target: str, norm: str) -> Callable[[Tensor, Tensor], object]:
    """LayerNorm(x + sublayer(x)) (Vaswani et al. 2017, section 3.1), of the last projection's input and x."""

    def forward(hidden: Tensor, x: Tensor) -> object:
        sublayer = into.get_submodule(part)
        return into.get_submodule(norm)(x + sublayer(x, sublayer.get_submodule(target)(hidden)))

    return forward


def _opt(layer: nn.Module, into: nn.Module, heads: int) -> None:
    attention = layer.get_submodule("self_attn")
    for name in ("q_proj", "k_proj", "v_proj"):
        _move(attention, name, into, f"self_attn.{name}")
    _move(attention, "out_proj", into, "self_attn.o_proj")
    _wrap(layer, "self_attn", into, "self_attn")
    _norms(layer, into, "self_attn_layer_norm", "final_layer_norm")
    mlp, seen = into.get_submodule("mlp"), []
    mlp.up_proj, mlp.down_proj = layer.fc1, layer.fc2

    def first(x: Tensor) -> object:
        seen.append(x)
        return mlp.get_submodule("up_proj")(x)

    layer.fc1 = Call(first)
    layer.fc2 = Call(lambda hidden: mlp(seen.pop(), mlp.get_submodule("down_proj")(hidden)))


def _phi(layer: nn.Module, into: nn.Module, heads: int) -> None:
    _move(layer.get_submodule("self_attn"), "dense", into, "self_attn.o_proj")
    _move(layer.get_submodule("mlp"), "fc1", into, "mlp.up_proj")
    _move(layer.get_submodule("mlp"), "fc2", into, "mlp.down_proj")


def _vit(layer: nn.Module, into: nn.Module, heads: int) -> None:
    attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _move(attention, name, into, f"self_attn.{name}")
    _move(mlp, "fc1", into, "mlp.up_proj")
    _move(mlp, "fc2", into, "mlp.down_proj")
    _norms(layer, into, "layernorm_before", "layernorm_after")
    _wrap(layer, "attention", into, "self_attn")
    _wrap(layer, "mlp", into, "mlp")


def _t5(layer: nn.Module, into: nn.Module, heads: int) -> None:
    first, *between, last = layer.get_submodule("layer").children()
    for name in "qkvo":
        _move(first.get_submodule("SelfAttention"), name, into, f"self_attn.{name}_proj")
    _move(first, "layer_norm", into, "input_layernorm")
    _wrap(first, "SelfAttention", into, "self_attn")
    for crossing in between:
        into.cross_attn = Part()
        for name in "qkvo":
            _move(crossing.get_submodule("EncDecAttention"), name, into, f"cross_attn.cross_{name}")
        _move(crossing, "layer_norm", into, "cross_attn_layernorm")
        _wrap(crossing, "EncDecAttention", into, "cross_attn")
    mlp = last.get_submodule("DenseReluDense")
    for name, target in (("wi", "up_proj"), ("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")):
        if hasattr(mlp, name):
            _move(mlp, name, into, f"mlp.{target}")
    # The class asks for this weight's dtype, if there is one. By its type no module has None as an attribute.
    setattr(mlp.get_submodule("wo"), "weight", None)  # noqa: B010
    _move(last, "layer_norm", into, "post_attention_layernorm")
    _wrap(last, "DenseReluDense", into, "mlp")


_Arrange = Callable[[nn.Module, nn.Module, int], None]
# Where the layers are, how each is arranged, and what stands outside them.
_LAYERS: Mapping[str, tuple[str, _Arrange, Mapping[str, str]]] = {
    "bert": ("bert.encoder.layer", _bert, {"bert.embeddings.word_embeddings": "embed_tokens"}),
    "gpt2": ("transformer.h", _gpt2, {"transformer.wte": "embed_tokens", "transformer.ln_f": "norm"}),
    "gpt_neox": (
        "gpt_neox.layers",
        _gpt_neox,
        {"gpt_neox.embed_in": "embed_tokens", "gpt_neox.final_layer_norm": "norm"},
    ),
    "opt": (
        "model.decoder.layers",
        _opt,
        {"model.decoder.embed_tokens": "embed_tokens", "model.decoder.final_layer_norm": "norm"},
    ),
    "phi": ("model.layers", _phi, {"model.final_layernorm": "norm"}),
    "t5": (
        "encoder.block|decoder.block",
        _t5,
        {"decoder.final_layer_norm": "norm", "encoder.final_layer_norm": "encoder_norm"},
    ),
    "vit": ("vit.layers", _vit, {"vit.layernorm": "norm"}),
    "roberta": ("roberta.encoder.layer", _bert, {"roberta.embeddings.word_embeddings": "embed_tokens"}),
}


def _split(
    parent: nn.Module,
    name: str,
    into: nn.Module,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    join: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    """q, k and v of a fused projection as linears of their own, whose outputs `join` puts where they were."""
    attention, names = into.get_submodule("self_attn"), ("q_proj", "k_proj", "v_proj")
    for target, weight, bias in zip(names, weights, biases, strict=True):
        setattr(attention, target, _linear(weight, bias))
    setattr(parent, name, Call(lambda x: join([attention.get_submodule(target)(x) for target in names])))


def _move(parent: nn.Module, name: str, into: nn.Module, path: str) -> None:
    place, _, child = path.rpartition(".")
    setattr(into.get_submodule(place), child, parent.get_submodule(name))
    setattr(parent, name, Call(lambda x: into.get_submodule(path)(x)))


def _norms(layer: nn.Module, into: nn.Module, first: str, second: str) -> None:
    _move(layer, first, into, "input_layernorm")
    _move(layer, second, into, "post_attention_layernorm")


def _wrap(layer: nn.Module, name: str, into: nn.Module, part: str) -> None:
    """Let the input and output of a sublayer pass through `part`."""
    setattr(layer, name, _seen(layer.get_submodule(name), into.get_submodule(part)))


def _seen(inner: nn.Module, by: nn.Module) -> Call:
    """`inner`, whose input and output pass through `by`."""

    def forward(*args: Tensor, **kwargs: Tensor) -> object:
        out = inner(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return (by(x, out[0]), *out[1:]) if isinstance(out, tuple) else by(x, out)

    return Call(forward)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear

"""Starting values of a graft: seeded per tensor, so that they do not depend on the order or company of its making."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from math import sqrt

import torch
from torch import Tensor

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Attention, RouteTable, Rows
from polygraft.grafts.sites import KV_SITE, Site
from polygraft.grafts.sizes import TensorSpec, tensors
from polygraft.grafts.spec import GraftSpec


def initialise(spec: GraftSpec, backbone: Backbone, *, seed: int, prompt: Sequence[int]) -> dict[str, Tensor]:
    """float32 tensors (float64 on a float64 backbone) by name.

    A of a branch is Kaiming-uniform with a = sqrt(5) as in PEFT, B zero; g one, b zero; m the row norms of W (DoRA);
    prefix rows are the keys and values of the backbone over `prompt` (token ids, repeated to the prefix length): a
    prefix that starts as real text changes little at step 0 (Li & Liang 2021, section 7.4).
    """
    wide = torch.promote_types(backbone.dtype, torch.float32)
    real = _keys_and_values(backbone, prompt, spec.prefix_length) if spec.prefix_length else {}
    return {tensor.name: _start(tensor, backbone, seed, real).to(wide) for tensor in tensors(spec, backbone.shape)}


def _start(tensor: TensorSpec, backbone: Backbone, seed: int, real: dict[Site, tuple[Tensor, Tensor]]) -> Tensor:
    match tensor.start:
        case "kaiming":
            words = sha256(f"{seed}/{tensor.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)
            bound = 1 / sqrt(tensor.shape[1])
            return torch.rand(tensor.shape, generator=generator) * (2 * bound) - bound
        case "zero":
            return torch.zeros(tensor.shape)
        case "one":
            return torch.ones(tensor.shape)
        case "row_norm":
            linear, member = backbone.linears[tensor.site]
            return linear.row_sq.split_with_sizes(linear.widths)[member].sqrt()
        case "prefix":
            return real[tensor.site][0 if tensor.part == "k" else 1]


class _Recorder:
    """An attention that keeps every layer's keys and values and attends as usual."""

    def __init__(self, inner: Attention, kept: dict[Site, tuple[Tensor, Tensor]]) -> None:
        self.inner, self.kept = inner, kept

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scaling: float) -> Tensor:
        self.kept[Site(layer, KV_SITE)] = (k.clone(), v.clone())
        return self.inner(layer, q, k, v, route=route, scaling=scaling)


def _keys_and_values(backbone: Backbone, prompt: Sequence[int], length: int) -> dict[Site, tuple[Tensor, Tensor]]:
    repeated = (list(prompt) or [0]) * (length // max(1, len(prompt)) + 1)
    rows = Rows(torch.tensor(repeated[:length]), torch.arange(length), ())
    kept: dict[Site, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        backbone.forward(rows, backbone.stacks([]), _Recorder(WholeSequences(((0, length),), backbone.shape), kept))
    return {site: (k[:length].clone(), v[:length].clone()) for site, (k, v) in kept.items()}

"""The layer plan: the layers of a decoder over a paged cache, run by our own loop over compiled calls.

transformers' classes call hundreds of Python functions a layer. Where its layers are what `Architecture.pre_norm` says,
a backbone makes the same calls one after the other, in the same order on the same numbers, so that the bits are those
of the classes. The classes run everything that is not covered here, and are the oracle in the tests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.runtime.cache import PagedAttention
from polygraft.grafts.runtime.feedforward import GatedFeedForward
from polygraft.grafts.runtime.keys import KVKey, OpKey, Phase
from polygraft.grafts.runtime.layer_program import LayerProgram, PlannedLayer, PlannedLayers, program
from polygraft.grafts.runtime.modules import Layer, SiteLinear, SiteNorm, Sublayer
from polygraft.grafts.runtime.rotary_attention import RotaryAttention
from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.sites import BLOCK_SITE, EMBED_SITE, FINAL_SITE, KV_SITE, ModelShape, Site, module_path
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.rotary.op import HeadNorms

_KEPT = 4  # programs of a composition of grafts: streams come and go, and the same rows come again
Programs = OrderedDict[Hashable, LayerProgram | None]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The frozen parts of a backbone's layers."""

    layers: PlannedLayers

    @staticmethod
    def of(base: nn.Module, shape: ModelShape, projections: Mapping[Site, SiteLinear]) -> LayerPlan | None:
        """Of an adopted model; None where its layers are others."""
        if not architecture(shape.arch).pre_norm:
            return None
        planned = [_layer(base, shape, projections, layer) for layer in range(shape.layers)]
        layers = tuple(layer for layer in planned if layer is not None)
        final = base.get_submodule(module_path(Site(shape.layers - 1, FINAL_SITE), shape))
        assert isinstance(final, SiteNorm)
        if len(layers) < len(planned):
            return None
        return LayerPlan(PlannedLayers(layers, final, base.get_submodule("rotary_emb")))

    def run(self, x_TD: Tensor, positions_T: Tensor, route: RouteTable) -> Tensor | None:
        """The states [T, hidden] after the final norm of embedded rows; None where the modules must run.

        Not to be called by two threads at a time.
        """
        attention, stacks = route.attention, route.stacks
        if x_TD.is_cuda:
            return None  # the compiled calls are a CPU's
        if not isinstance(attention, PagedAttention) or route.entry is not None or route.source is not None:
            return None
        if stacks.trainable or not stacks.derived((_covered,), lambda: _covered(stacks)):
            return None
        kept = stacks.derived((LayerPlan,), Programs)
        place = attention.cache, torch.get_num_threads()
        made = None
        if not route.spans:  # rows of the bare model alone: one program, whose calls take any number of them
            made = self._made(kept, place, x_TD, attention, route, rows=1 << (len(x_TD) - 1).bit_length())
        if made is None or not made.takes(len(x_TD)):
            key = len(x_TD), route.spans, route.inputs, *place
            made = self._made(kept, key, x_TD, attention, route, rows=len(x_TD))
        with torch.no_grad():
            return None if made is None else made.run(x_TD, positions_T, attention)

    def _made(
        self, kept: Programs, key: Hashable, x_TD: Tensor, attention: PagedAttention, route: RouteTable, rows: int
    ) -> LayerProgram | None:
        """The program that is kept under the key; made for so many rows where there is none, or where it takes any
        number of them, and these are more than it has room for."""
        made = kept.get(key)
        if key not in kept or (made is not None and made.rows and not made.takes(len(x_TD))):
            # A program's own tensors outlive the mode that one forward is in.
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = program(self.layers, x_TD, attention.cache, route, rows)
        kept.move_to_end(key)
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[key]


def _layer(
    base: nn.Module, shape: ModelShape, projections: Mapping[Site, SiteLinear], layer: int
) -> PlannedLayer | None:
    block = base.get_submodule(module_path(Site(layer, BLOCK_SITE), shape))
    assert isinstance(block, Layer)

    def module(name: str) -> nn.Module:
        return block.inner.get_submodule(architecture(shape.arch).modules[name])

    around, feed, norms = module("attn.out"), module("ffn.out"), (module("norm.1"), module("norm.2"))
    assert isinstance(around, Sublayer)
    assert isinstance(feed, Sublayer)
    if not isinstance(feed.inner, GatedFeedForward) or not all(isinstance(norm, SiteNorm) for norm in norms):
        return None
    attention = around.inner
    assert isinstance(attention, RotaryAttention)
    heads = [getattr(attention, f"{part}_norm", None) for part in "qk"]
    return PlannedLayer(
        layer=layer,
        norms=norms,  # type: ignore[arg-type]  # as was just asked
        projections={site.name: one for site, one in projections.items() if site.layer == layer and one.member == 0},
        head_norms=_head_norms(*heads),
        scores=Scores(attention.scaling, attention.sliding_window),
    )


def _head_norms(q: nn.Module | None, k: nn.Module | None) -> HeadNorms | None:
    if q is None or k is None:
        return None
    assert isinstance(q, SiteNorm)
    assert isinstance(k, SiteNorm)
    assert q.norm.weight is not None
    assert k.norm.weight is not None
    assert q.norm.eps == k.norm.eps
    return HeadNorms(q.norm.weight, k.norm.weight, q.norm.eps)


def _covered(stacks: Stacks) -> bool:
    """Whether all that the grafts do is before the first layer, in the cache, or on what a call has written."""
    return all(_follows(site, key) for site, here in stacks.at.items() for key in here)


def _follows(site: Site, key: OpKey) -> bool:
    if site.name == KV_SITE:
        return key == KVKey()
    return site.name == EMBED_SITE or (site.name != BLOCK_SITE and key.phase > Phase.OWN)

"""Starting values of a graft: seeded per tensor, so that they do not depend on the order or company of its making."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor

from polygraft.grafts import calibrate
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.lowering import lower
from polygraft.grafts.methods.registry import start
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pooler import pooler
from polygraft.grafts.runtime.recorded import keys_and_values, states
from polygraft.grafts.runtime.route import Rows
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.sites import KV_SITE, Site
from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.sources import Source, check, continued
from polygraft.grafts.spec import GraftSpec, Tokens

T = TypeVar("T")


@dataclass(frozen=True)
class Making:
    """What starting values may be made from: the backbone, the job's seed, its training samples as token ids with the
    loss weights of their tokens, and the grafts that its spec
    names.

    All tensors here lie on the CPU, so that a job draws the same numbers on every device.
    """

    graft: BoundGraft
    backbone: Backbone
    seed: int
    samples: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    _kept: dict[object, object] = field(default_factory=dict)

    @property
    def spec(self) -> GraftSpec:
        return self.graft.spec

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of the seed and a tensor's name alone."""
        words = sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)

    def weight(self, site: Site) -> Tensor:
        """The frozen W [out, in] of a projection, float32 or wider."""
        return self.backbone.weight(site).cpu()

    def embedded(self, ids: Tensor) -> Tensor:
        """The backbone's input embeddings of token ids, [n, hidden]."""
        return self.backbone.embedding[ids.to(self.backbone.device)].cpu()

    @property
    def inputs(self) -> Mapping[Site, int]:
        """The projections that the graft acts at, and the widths of what they read."""
        shape = self.backbone.shape
        found = {tensor.site for tensor in self.graft.tensors if tensor.site in self.backbone.linears}
        return {site: shape.dims(site.name)[0] for site in sorted(site for site in found if site is not None)}

    def graft_gradients(self, spec: GraftSpec, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """dL/dvalues on the job's samples, by name, of a graft that need not be the job's."""
        graft = BoundGraft(spec, self.backbone.shape)
        return calibrate.graft_gradients(self.backbone, graft, values, self.samples, self.weights)

    @property
    def observed(self) -> int:
        """How many samples `observe` shows."""
        return min(len(self.samples), calibrate.SAMPLES)

    def observe(self, seen: calibrate.Seen) -> None:
        """DeclRef `seen(site, x)` with what these projections read in the bare backbone, sample by sample."""
        calibrate.observe(self.backbone, self.samples, self.inputs, seen)

    @property
    def gradients(self) -> Mapping[Site, Tensor]:
        """The gradient [out, in] of the bare backbone's loss on the samples in these projections' weights."""
        return self.once(
            "gradients", lambda: calibrate.gradients(self.backbone, self.samples, self.weights, self.inputs)
        )

    @property
    def fisher(self) -> Mapping[Site, Tensor]:
        """The sum over the samples of their squared gradients in these projections' weights, [out, in]."""
        return self.once(
            "fisher",
            lambda: calibrate.gradients(self.backbone, self.samples, self.weights, self.inputs, squared=True),
        )

    def prefix(self, length: int) -> Mapping[Site, tuple[Tensor, Tensor]]:
        """Keys and values of the bare backbone over `prompt`, repeated to `length` rows, by kv site."""

        def make() -> Mapping[Site, tuple[Tensor, Tensor]]:
            with torch.inference_mode():
                found = keys_and_values(self.backbone, self._rows(length))
                return {Site(layer, KV_SITE): (k.cpu().clone(), v.cpu().clone()) for layer, (k, v) in found.items()}

        return self.once(("prefix", length), make)

    def states(self, length: int, layer: int) -> Tensor:
        """What a layer of the bare backbone reads of `prompt`, repeated to `length` rows, [length, hidden]."""
        with torch.inference_mode():
            return states(self.backbone, self._rows(length), layer).cpu().clone()

    def _rows(self, length: int) -> Rows:
        builder = RowBuilder()
        builder.add(_repeated(self.prompt, length))
        return builder.rows()

    @property
    def prompt(self) -> Sequence[int]:
        """What prefixes and prompts start as: the first sample, or the rows of an image without content."""
        if self.backbone.shape.images:
            return range(len(self.backbone.embedding))
        return self.samples[0] if self.samples else ()

    def source(self, name: str) -> Source:
        """A graft that the spec names, as it is served."""

        def make() -> Source:
            found = self.sources[name]
            values = {name: value.to(self.backbone.device) for name, value in found.tensors.items()}
            frozen = self.backbone.weight, self.backbone.run_from_layer
            graft, served = lower(found.graft, values, *frozen)
            return Source(graft, {name: value.cpu() for name, value in served.items()})

        return self.once(("source", name), make)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all the tensors that start from it."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]


def initialise(
    graft: BoundGraft,
    backbone: Backbone,
    *,
    seed: int,
    samples: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] = (),
    sources: Mapping[str, Source] | None = None,
) -> dict[str, Tensor]:
    """float32 tensors (float64 on a float64 backbone) by name on the CPU, each by its start.

    A of a branch is Kaiming-uniform with a = sqrt(5) as in PEFT, B zero; g one, b zero; m the row norms of W (DoRA);
    prefix rows are the keys and values of the backbone over the first of `samples` (repeated to the prefix length): a
    prefix that starts as real text changes little at step 0 (Li & Liang 2021, section 7.4). A prompt starts as the
    embeddings of the same tokens, an edited token as its own. `sources` are the grafts of `spec.sources`, by name;
    raises SpecError where they do not give what the graft takes of them.
    """
    wide = torch.promote_types(backbone.dtype, torch.float32)
    sources = sources or {}
    check(graft, {name: source.graft for name, source in sources.items()})
    making = Making(graft, backbone, seed, samples, weights, sources)
    taken = continued(graft, sources)
    return {t.name: (taken[t.name] if t.name in taken else _start(t, making)).to(wide) for t in graft.tensors}


def _start(tensor: TensorSpec, making: Making) -> Tensor:
    arguments = tensor.start.keywords()
    match tensor.start.name:
        case "kaiming":
            bound = 1 / sqrt(tensor.shape[1])
            return torch.rand(tensor.shape, generator=making.generator(tensor.name)) * (2 * bound) - bound
        case "normal":
            std = float(arguments.get("std", 0.02))
            return std * torch.randn(tensor.shape, generator=making.generator(tensor.name))
        case "zero":
            return torch.zeros(tensor.shape)
        case "one":
            return torch.ones(tensor.shape)
        case "full":
            return torch.full(tensor.shape, float(arguments["value"]))
        case "row_norm":
            assert tensor.site is not None
            linear, member = making.backbone.linears[tensor.site]
            return linear.row_sq.split_with_sizes(linear.widths)[member].cpu().sqrt()
        case "prefix":
            assert tensor.site is not None
            return making.prefix(tensor.shape[0])[tensor.site][0 if tensor.part == "k" else 1]
        case "embedded":
            slot = making.spec.slots[tensor.slot]
            ids = slot.ids if isinstance(slot, Tokens) and slot.ids else _repeated(making.prompt, tensor.shape[0])
            return making.embedded(torch.tensor(ids))
        case "pooler":
            return pooler(making.backbone.folder)[0 if tensor.part == "dense.weight" else 1]
        case name:
            return start(name).make(tensor, making, **arguments)


def _repeated(prompt: Sequence[int], length: int) -> list[int]:
    return ((list(prompt) or [0]) * (length // max(1, len(prompt)) + 1))[:length]

"""How a transformers model becomes a backbone: its linears, norms and sublayers are replaced by ours, where its
architecture's table says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor, nn

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.methods.compressed.quantisation import Quantisation
from polygraft.grafts.runtime.attention import position_bias
from polygraft.grafts.runtime.feedforward import GatedFeedForward
from polygraft.grafts.runtime.linears.choose import frozen_linear
from polygraft.grafts.runtime.linears.nf4 import Nf4Linear
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.modules import FusedProjection, Layer, SiteLinear, SiteNorm, Sublayer, SublayerInput
from polygraft.grafts.runtime.norms import FrozenNorm
from polygraft.grafts.runtime.pretrained import Quantise
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.rotary_attention import RotaryAttention
from polygraft.grafts.sites import BLOCK_SITE, NORMS, SUBLAYER, ModelShape, Site, module_path

# Projections that read one input and are multiplied as one.
FUSED_GROUPS = (
    ("attn.q", "attn.k", "attn.v"),
    ("attn.o",),
    ("cross.q",),
    ("cross.k", "cross.v"),
    ("cross.o",),
    ("ffn.gate", "ffn.up"),
    ("ffn.down",),
)

# The projection that reads a sublayer's input.
_FIRST = {"attn.out": "attn.q", "cross.out": "cross.q", "ffn.out": "ffn.up"}


class Adoption:
    """The frozen parts of `base`, the model without its head: `linears` gives every linear site its FrozenLinear and
    its place in it, `projections` the module that stands there."""

    def __init__(
        self, base: nn.Module, shape: ModelShape, *, prepack: bool, block: int | None, quantise: Quantise | None = None
    ) -> None:
        self.base, self.shape, self.table = base, shape, architecture(shape.arch)
        self.linears: dict[Site, tuple[FrozenLinear, int]] = {}
        self.projections: dict[Site, SiteLinear] = {}
        self._prepack, self._block, self._quantise = prepack, block, quantise

    def run(self) -> None:
        """Innermost modules first, since a module's path changes when one around it is replaced."""
        norms = {self._path(site): site for site in self._sites(NORMS)}
        for path, module in list(self.base.named_modules()):
            norm = FrozenNorm.of(module, self.table.norm_offset)
            if norm is not None:
                self._put(path, SiteNorm(norms.get(path), norm))
        for layer in range(self.shape.layers):
            self._projections(layer)
        for site in self._sites(SUBLAYER):
            self._sublayer(site)
        for site in self._sites((BLOCK_SITE,)):
            self._put(self._path(site), Layer(site, self.base.get_submodule(self._path(site))))

    def fused(self) -> Iterator[str]:
        """The names in `base` of the weights that will be copied into one with others."""
        for layer in range(self.shape.layers):
            for group in self._groups(layer):
                yield from (f"{self._path(site)}.weight" for site in group if len(group) > 1)

    def _projections(self, layer: int) -> None:
        for group in self._groups(layer):
            rows = [self._rows(site) for site in group]
            weights, biases = [weight for weight, _ in rows], [bias for _, bias in rows]
            linear = (
                frozen_linear(weights, biases, prepack=self._prepack, block=self._block)
                if self._quantise is None
                else Nf4Linear(weights, biases, block=self._block, quantisation=Quantisation.of(self._quantise))
            )
            members = [SiteLinear(group, linear, member) for member in range(len(group))]
            for member, site in enumerate(group):
                self.linears[site], self.projections[site] = (linear, member), members[member]
            for path, sharing in groupby(members, lambda member: self._path(member.site)):
                fused = list(sharing)
                heads = self.shape.heads if self.table.interleaved else None
                self._put(path, FusedProjection(fused, heads) if len(fused) > 1 else fused[0])

    def _sublayer(self, site: Site) -> None:
        from transformers.activations import SiLUActivation

        inner = self.base.get_submodule(self._path(site))
        if isinstance(getattr(inner, "act_fn", None), SiLUActivation) and "ffn.gate" in self.table.modules:
            inner = GatedFeedForward(inner.gate_proj, inner.up_proj, inner.down_proj)  # type: ignore[arg-type]
        if self.table.pre_norm and site.name == "attn.out":
            inner = RotaryAttention(inner)
        ends, first = site.name in self.table.inputs, inner
        self._put(self._path(site), Sublayer(site, inner, ends=ends, norm=None if ends else self._norm_before(site)))
        if ends:
            path = f"{self.table.layers}.{site.layer}.{self.table.inputs[site.name]}"
            first = self.base.get_submodule(path)
            self._put(path, SublayerInput(site, first))
        # What attends says where it stands; not every class does.
        first.layer_idx = site.layer  # type: ignore[assignment]
        first.crosses = site.name == "cross.out"  # type: ignore[assignment]
        if hasattr(first, "relative_attention_bias"):
            first.compute_bias = position_bias(first.compute_bias)  # type: ignore[arg-type,assignment]

    def _norm_before(self, site: Site) -> Site | None:
        """The norm whose output a sublayer reads; None where the table names none."""
        table = self.shape.stack(site.layer)
        names = (name for name in NORMS if _FIRST[site.name] in table.readers(name))
        return next((Site(site.layer, name) for name in names), None)

    def _rows(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias of a projection, which may be some rows of a module's."""
        module = self.base.get_submodule(self._path(site))
        stored, bias = module.get_parameter("weight"), module.bias
        weight = stored.T if self.table.transposed else stored
        assert bias is None or isinstance(bias, Tensor)
        rows = self.shape.rows(site.name)
        return weight[rows], None if bias is None else bias[rows]

    def _groups(self, layer: int) -> Iterator[list[Site]]:
        for names in FUSED_GROUPS:
            group = [site for name in names if self.shape.has(site := Site(layer, name))]
            if group:
                yield group

    def _sites(self, names: tuple[str, ...]) -> Iterator[Site]:
        for layer in range(self.shape.layers):
            yield from (site for name in names if self.shape.has(site := Site(layer, name)))

    def _path(self, site: Site) -> str:
        return module_path(site, self.shape)

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self.base.get_submodule(parent), child, module)


class HeadTransform(nn.Module):
    """norm(act(W x + b)), which an encoder's head does before its vocabulary projection (Devlin et al. 2019)."""

    def __init__(self, dense: FrozenLinear, act: nn.Module, norm: FrozenNorm) -> None:
        super().__init__()
        self.dense, self.act, self.norm = dense, act, norm

    def forward(self, x_TD: Tensor) -> Tensor:
        (y,) = project(x_TD, self.dense)
        return self.norm(self.act(y if self.dense.bias is None else y + self.dense.bias))


def head_transform(model: nn.Module, table: Architecture, *, prepack: bool, block: int | None) -> HeadTransform | None:
    """That of `model`, which has a head; None where the table names none."""
    from transformers.activations import ACT2FN

    if table.transform is None:
        return None
    dense, norm = model.get_submodule(table.transform.dense), FrozenNorm.of(model.get_submodule(table.transform.norm))
    assert norm is not None and isinstance(dense, nn.Linear)
    act = ACT2FN[table.transform.act or model.config.hidden_act]  # type: ignore[union-attr]
    return HeadTransform(frozen_linear([dense.weight], [dense.bias], prepack=prepack, block=block), act, norm)

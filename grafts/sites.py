"""Where a graft can act: canonical sites of a backbone, resolved per architecture. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.head import HeadKind
from polygraft.grafts.spec import (
    KV,
    Affine,
    Branch,
    Delta,
    GraftSpec,
    Layers,
    Norm,
    Rotate,
    Slot,
    Sparse,
    SpecError,
    Tokens,
)

K = TypeVar("K", bound=Hashable)
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
CROSS = ("cross.q", "cross.k", "cross.v", "cross.o")  # a decoder's attention to its encoder's states
LINEAR = (*ATTENTION, *CROSS, "ffn.gate", "ffn.up", "ffn.down")
SUBLAYER = ("attn.out", "cross.out", "ffn.out")
SOURCE = ("cross.k", "cross.v")  # projections that read an encoder's rows and not their own layer's
BLOCK_SITE = "block.out"
FINAL_SITE = "norm.final"
NORMS = ("norm.1", "norm.cross", "norm.2", FINAL_SITE)
KV_SITE = "kv"
EMBED_SITE = "embed"
# The projection whose output a sublayer's is.
ENDS = {"attn.out": "attn.o", "cross.out": "cross.o", "ffn.out": "ffn.down"}
ALL = (*LINEAR, *SUBLAYER, BLOCK_SITE, *NORMS, KV_SITE, EMBED_SITE)


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place in one layer; `str()` is its key in files and logs."""

    layer: int
    name: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a backbone that sizes and sites depend on."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    encoder_layers: int = 0  # of the layers, the first ones, where a decoder follows
    positions: int = 0  # that a sequence may have; 0 = no limit

    @staticmethod
    def from_config(config: Mapping[str, object]) -> ModelShape:
        """From the fields of a transformers config.json; raises SpecError for an architecture without a site table, and
        for a config that its table is not right for."""
        table = architecture(str(config.get("model_type")))
        if table.variant is not None:
            table = architecture(table.variant(config))
        if (reason := table.refusal(config)) is not None:
            raise SpecError(reason)

        def number(field: str, default: int | None = None) -> int:
            key = table.key(field)
            value = config.get(key)
            if value is None:
                value = default
            if not isinstance(value, int):
                raise SpecError(f"{key}: {value!r} is not an integer in the backbone's config.json")
            return value

        heads, hidden = number("heads"), number("hidden")
        before = number("encoder_layers") if table.encoder else 0
        return ModelShape(
            arch=table.model_type,
            layers=before + number("layers", before or None),
            hidden=hidden,
            heads=heads,
            kv_heads=number("kv_heads", heads),
            head_dim=number("head_dim", hidden // heads),
            ffn=number("ffn", table.ffn_ratio and table.ffn_ratio * hidden),
            vocab=0 if table.patches else number("vocab"),
            encoder_layers=before,
            positions=max(0, number("positions", 0) - table.first_position),
        )

    def check_length(self, max_length: int, before: int) -> None:
        """Raise SpecError where examples of so many tokens, after the `before` that a graft puts there, reach beyond
        the last position."""
        if 0 < self.positions < before + max_length:
            after = f" and the {before} that the graft puts before them" if before else ""
            raise SpecError(
                f"max_length: {max_length} tokens{after} are more than the backbone's {self.positions} positions; "
                f"at most {max(0, self.positions - before)} are left for an example"
            )

    def length_limit(self, asked: int | None, before: int) -> int | None:
        """After how many tokens an example is cut: what was asked for, else where the positions end after the `before`
        that a graft puts there; None: never. Raises SpecError where there is no room for that, or for two tokens."""
        self.check_length(2 if asked is None else asked, before)
        return asked if asked is not None or not self.positions else self.positions - before

    @property
    def causal(self) -> bool:
        """Whether a row sees the rows before it alone, as decoding and jobs need; `sees` says what it sees else."""
        return architecture(self.arch).causal and not self.encoder_layers

    @property
    def head_kind(self) -> HeadKind | None:
        """The classifier that goes on top; None where texts are not classified."""
        return None if self.encoder_layers else architecture(self.arch).head_kind

    @property
    def sees(self) -> str:
        if self.encoder_layers:
            return f"{self.arch} is an encoder and a decoder, whose rows see another sequence, too"
        return f"{self.arch} is an encoder, whose rows see what follows"

    def stack(self, layer: int) -> Architecture:
        """The table of the layer: the encoder's where a decoder follows, else the architecture's own."""
        table = architecture(self.arch)
        return table.encoder if table.encoder is not None and layer < self.encoder_layers else table

    def within(self, layer: int) -> int:
        """The layer's number in its own stack."""
        return layer if layer < self.encoder_layers else layer - self.encoder_layers

    def depth(self, layers: str) -> int:
        """How many layers the stack has whose list of layers this is."""
        encoder = self.encoder_layers and self.stack(0).layers == layers
        return self.encoder_layers if encoder else self.layers - self.encoder_layers

    def has(self, site: Site) -> bool:
        """Whether the layer has a module for the site; the last norm is in the last layer of each stack."""
        ends = (self.encoder_layers - 1, self.layers - 1)
        return self.stack(site.layer).has(site.name) and (site.name != FINAL_SITE or site.layer in ends)

    @property
    def images(self) -> bool:
        """Whether the rows are patches of images and not tokens."""
        return architecture(self.arch).patches

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def rows(self, name: str) -> slice | list[int]:
        """The rows of the linear site `name` among the outputs of its module, which other sites may share."""
        table = architecture(self.arch)
        fused = table.fused_with(name)
        index = fused.index(name)
        if table.interleaved and len(fused) > 1:
            size = self.dims(name)[1] // self.heads
            return [(head * len(fused) + index) * size + i for head in range(self.heads) for i in range(size)]
        first = sum(self.dims(other)[1] for other in fused[:index])
        return slice(first, first + self.dims(name)[1])

    def dims(self, name: str) -> tuple[int, int]:
        """(input width, output width) of the site `name`; a norm has equal ones."""
        q, kv, hidden, ffn = self.heads * self.head_dim, self.kv_width, self.hidden, self.ffn
        return {
            "attn.q": (hidden, q),
            "attn.k": (hidden, kv),
            "attn.v": (hidden, kv),
            "attn.o": (q, hidden),
            "cross.q": (hidden, q),
            "cross.k": (hidden, kv),
            "cross.v": (hidden, kv),
            "cross.o": (q, hidden),
            "ffn.gate": (hidden, ffn),
            "ffn.up": (hidden, ffn),
            "ffn.down": (ffn, hidden),
            KV_SITE: (hidden, kv),
        }.get(name, (hidden, hidden))


def resolve(slot: Slot, shape: ModelShape) -> tuple[Site, ...]:
    """The sites of `slot` in layer order.

    `slot.at` is canonical names or fnmatch patterns joined by `|` (`attn.[qv]|ffn.down`), `linear` for all
    projections, or
    module names as in PEFT's target_modules (`q_proj`). Raises SpecError when a part matches nothing the op can act on.
    """
    if isinstance(slot, Tokens) and max(slot.ids, default=-1) >= shape.vocab:
        known = f"0-{shape.vocab - 1}" if shape.vocab else "none"
        raise SpecError(f"ids: {max(slot.ids)} is not a token of this backbone; it has {known}")
    if isinstance(slot, KV) and slot.aside and shape.encoder_layers:
        raise SpecError(f"aside: rows without a place have no bias of positions, which {shape.arch} adds; use a prefix")
    table = architecture(shape.arch)
    allowed = tuple(name for name in _allowed(slot) if name in (KV_SITE, EMBED_SITE) or table.has(name))
    names = tuple(
        name for name in ALL if any(name in _matches(part, shape.arch, allowed) for part in slot.at.split("|"))
    )
    for part in slot.at.split("|"):
        if not _matches(part, shape.arch, allowed):
            raise SpecError(
                f"at: {part!r} matches no site of {shape.arch} for op {slot.op!r}; sites: {', '.join(allowed)}"
            )
    found = tuple(
        Site(layer, name)
        for layer in _layers(slot.layers, shape)
        for name in names
        if (layer == 0 if name == EMBED_SITE else name == KV_SITE or shape.has(Site(layer, name)))
    )
    if not found:
        ends = f"{EMBED_SITE} is in layer 0, {FINAL_SITE} in the last, {shape.layers - 1}"
        raise SpecError(f"layers: {slot.at!r} stands in none of them; {ends}")
    return found


def sites_of(spec: GraftSpec, shape: ModelShape) -> tuple[tuple[int, Site], ...]:
    """(slot index, site) of every place the graft acts, slot-major.

    Raises SpecError for slots that have no meaning together at a site: a norm without just one linear branch to
    rescale, two norms, two scales or two shifts of one thing, branches of one kind with different dropout.
    """
    placed = tuple((index, site) for index, slot in enumerate(spec.slots) for site in resolve(slot, shape))
    together: dict[Site, tuple[int, ...]] = {}
    for index, site in placed:
        together[site] = (*together.get(site, ()), index)
    first: dict[tuple[int, ...], Site] = {}  # layers mostly have the same slots
    for site, indices in together.items():
        first.setdefault(indices, site)
    for indices, site in first.items():
        _check(site, [spec.slots[index] for index in indices])
    return placed


def gathered(placed: Iterable[tuple[Site, K]], shape: ModelShape) -> Iterator[tuple[K, tuple[str, ...], Layers]]:
    """What is placed at sites, as slots say it: names that have a thing in the same layers, None for all they are
    in."""
    layers: dict[tuple[str, K], list[int]] = {}
    for site, one in placed:
        layers.setdefault((site.name, one), []).append(site.layer)
    together: dict[tuple[K, Layers], list[str]] = {}
    for (name, one), where in layers.items():
        every = [layer for layer in range(shape.layers) if shape.has(Site(layer, name))]
        together.setdefault((one, None if where == every else tuple(where)), []).append(name)
    for (one, chosen), names in together.items():
        yield one, tuple(names), chosen


def sublayers(at: str) -> tuple[str, ...]:
    """The sublayers' outputs among the canonical names that `at` matches, whatever the backbone."""
    return tuple(name for name in SUBLAYER if any(_named(part, name) for part in at.split("|")))


def meets_no_projection(at: str) -> bool:
    """Whether `at` matches a site that no projection of a layer feeds or reads, whatever the backbone."""
    return any(_named(part, name) for part in at.split("|") for name in (BLOCK_SITE, FINAL_SITE))


def mergeable(spec: GraftSpec) -> bool:
    """Whether every slot, as it is served, is affine in what a projection reads, so that the graft can be folded into
    the weights.

    A branch around a whole sublayer is not, since its input is not the projection's; nor is what acts on the residual
    stream or after the final norm, where no projection of a layer ends or begins.
    """
    return all(map(folds, spec.slots))


def folds(slot: Slot) -> bool:
    """Whether a slot is one that `mergeable` allows."""
    if isinstance(slot, Branch):
        linear = slot.act == "identity" and not slot.bias and slot.gate in ("none", "noise")
        return linear and (slot.tap == "output" or not sublayers(slot.at)) and not meets_no_projection(slot.at)
    if isinstance(slot, Affine):
        return not meets_no_projection(slot.at)
    return isinstance(slot, Norm | Delta | Sparse | Rotate)


def module_path(site: Site, shape: ModelShape) -> str:
    """Path of the site's module inside the transformers backbone, e.g. `layers.3.self_attn.q_proj`."""
    return shape.stack(site.layer).path(shape.within(site.layer), site.name)


def model_path(site: Site, shape: ModelShape) -> str:
    """The same inside the model with its head."""
    return f"{architecture(shape.arch).backbone}.{module_path(site, shape)}".lstrip(".")


def _allowed(slot: Slot) -> tuple[str, ...]:
    match slot:
        case Branch(tap="output"):
            return (*SUBLAYER, BLOCK_SITE)
        case Branch():
            return (*LINEAR, *SUBLAYER, BLOCK_SITE)
        case Affine(side="in" | "rows"):
            return LINEAR
        case Affine():
            return (*LINEAR, *SUBLAYER, BLOCK_SITE, *NORMS)
        case Norm() | Delta() | Sparse() | Rotate():
            return LINEAR
        case KV():
            return (KV_SITE,)
        case Tokens():
            return (EMBED_SITE,)


def _matches(part: str, arch: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    table = architecture(arch)
    return tuple(
        name for name in allowed if _named(part, name) or (name in LINEAR and part and table.matches(name, part))
    )


def _named(part: str, name: str) -> bool:
    """Whether `part` means the canonical site `name`."""
    if part in ("linear", "all-linear"):
        return name in LINEAR
    if name == BLOCK_SITE:
        return part == BLOCK_SITE  # the residual stream after the layer; no pattern means it
    if name in SUBLAYER and "*" in part and not part.endswith("out"):
        return False  # `attn.*` means the projections; the sublayer's output is named
    return fnmatchcase(name, part)


def _check(site: Site, slots: Sequence[Slot]) -> None:
    branches = [slot for slot in slots if isinstance(slot, Branch)]
    linear = [b for b in branches if (b.act, b.tap, b.bias, b.gate) == ("identity", "input", False, "none")]
    norms = sum(isinstance(slot, Norm) for slot in slots)
    if norms and not branches:
        raise SpecError(f"at: norm at {site} has no branch to rescale; add lora at the same sites")
    if norms > 1 or (norms and (len(branches) > 1 or not linear)):
        found = f"{norms} norms over {len(branches)} branches"
        raise SpecError(f"at: DoRA's norm rescales one lora at a site; found {found} at {site}")
    others = {slot.op for slot in slots if isinstance(slot, Sparse | Rotate)}
    if norms and others:
        found = ", ".join(sorted(others))
        raise SpecError(f"at: DoRA's norm rescales W and one lora; found {found} beside it at {site}")
    for side in ("in", "out", "rows"):
        if sum(isinstance(slot, Rotate) and slot.side == side for slot in slots) > 1:
            raise SpecError(f"at: two rotations of one graft meet at {site}; give each site one of them")
        affines = [slot for slot in slots if isinstance(slot, Affine) and slot.side == side]
        if sum(slot.scale for slot in affines) > 1 or sum(slot.shift for slot in affines) > 1:
            raise SpecError(f"at: two scales or two shifts of one graft meet at {site}; give each site one of them")
    kinds = {(branch.tap, branch.act, branch.bias, branch.gate) for branch in branches}
    if len({(b.tap, b.act, b.bias, b.gate, b.dropout) for b in branches}) > len(kinds):
        raise SpecError(f"dropout: branches of one kind have different rates at {site}; give them the same")


def _layers(layers: Layers, shape: ModelShape) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(shape.layers))
    for layer in layers:
        if not 0 <= layer < shape.layers:
            raise SpecError(f"layers: {layer} is not a layer of this backbone; it has 0-{shape.layers - 1}")
    return tuple(sorted(set(layers)))

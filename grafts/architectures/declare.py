"""What a file of this folder says of a family of transformers classes: where the canonical sites are. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from polygraft.grafts.head import HeadKind

Config = Mapping[str, object]
BLOCK, FINAL = "block.out", "norm.final"  # sites that every architecture, or most, has in the same way

# All that read a norm's output.
FEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"norm.1": ("attn.q", "attn.k", "attn.v"), "norm.2": ("ffn.gate", "ffn.up")}
)
ORDER = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
# Where transformers' config.json keeps the numbers of a `ModelShape`.
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "encoder_layers": "encoder_layers",
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn": "intermediate_size",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
    }
)


@dataclass(frozen=True, slots=True)
class Transform:
    """What an encoder's head does before its vocabulary projection, norm(act(dense(x))): paths from the whole model;
    `act` None means the config's `hidden_act`."""

    dense: str
    norm: str
    act: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One `model_type`.

    `modules` gives the module of a site by its path inside a layer, `layers` is the list of layers inside the backbone,
    `final` its last norm (None where the last layer's is the last), and `backbone` the backbone's path inside the class
    that has the head. Linear sites of one path are row ranges of
    one fused module: one after the other, or head by head when `interleaved`. `transposed` weights are [in, out].

    A sublayer's module takes the sublayer's input and returns what the residual sum adds. Where transformers has no
    such module, `modules` names the last projection and `inputs` the module that takes the sublayer's input first.

    `feeds` are the linear sites that read a norm's output, for norms that nothing else reads.

    The rows of one with `patches` are those of images, as the class's own module `embeddings` makes them; it has no
    tokens. `auto` is transformers' class of models with a head, `head` its path where it is not the output embeddings.

    A decoder with an `encoder` attends to that one's last states, too; the encoder's layers count first. Both are in
    one `backbone`. `variant` names the table of a config, where those of a model_type differ.

    A layer is `pre_norm` where it is x + attention of norm.1, then x + down(silu(gate) up) of norm.2, and turns the
    queries and keys of whole heads by one table of angles for all layers.

    `unread` are modules or tensors that files of the family may hold or lack, since nothing here reads them.

    `head_kind` is the classifier that transformers' class for sequences has, None where texts are not classified.

    `fields` are config names that differ from `FIELDS`, `ffn_ratio` the width of the feed-forward over the hidden one
    where the config does not say. `refusal` tells why a config is not one that this table is right for.
    """

    model_type: str
    modules: Mapping[str, str]
    layers: str = "layers"
    final: str | None = "norm"
    backbone: str = "model"
    embedding: str = "embed_tokens"
    causal: bool = True
    interleaved: bool = False
    transposed: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    head_kind: HeadKind | None = "linear"
    ffn_ratio: int | None = None
    norm_offset: float = 0.0  # the norm's factor is this plus its weight
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FEEDS)
    first_position: int = 0
    unread: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()  # linear modules outside the layers, whose names PEFT could confuse with a site's
    order: tuple[str, ...] = ORDER  # of a layer's linear modules, as transformers lists them
    auto: str = "AutoModelForCausalLM"
    transform: Transform | None = None
    patches: bool = False
    head: str | None = None
    pre_norm: bool = False
    encoder: Architecture | None = None
    variant: Callable[[Config], str] | None = None
    refusal: Callable[[Config], str | None] = lambda config: None

    def key(self, number: str) -> str:
        """The config's name of one of `ModelShape`'s numbers."""
        return self.fields.get(number, FIELDS[number])

    def has(self, name: str) -> bool:
        """Whether there is a module for the site."""
        return name in self.modules or name == BLOCK or (name == FINAL and self.final is not None)

    def path(self, layer: int, name: str) -> str:
        """The site's module inside the backbone, `layer` counting in this stack alone."""
        if name == FINAL:
            assert self.final is not None
            return self.final
        return f"{self.layers}.{layer}" if name == BLOCK else f"{self.layers}.{layer}.{self.modules[name]}"

    def readers(self, norm: str) -> tuple[str, ...]:
        """The linear sites that read the norm, none where the residual stream does, too."""
        return tuple(name for name in self.feeds.get(norm, ()) if name in self.modules)

    def fused_with(self, name: str) -> tuple[str, ...]:
        """The linear sites that share the module of `name`, in the order of their rows."""
        return tuple(site for site, path in self.modules.items() if path == self.modules[name] and not _whole(site))

    def targets(self, names: Collection[str]) -> tuple[str, ...] | None:
        """PEFT's target_modules for the linear sites `names` of every layer: for each the fewest last parts of its path
        that mean no other module. None where there are none, or where a site is but a part of a module."""
        found: dict[str, None] = {}
        others = [path for site, path in self.modules.items() if site not in names and not _whole(site)]
        for name in names:
            parts = self.modules[name].split(".")
            ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            fits = (end for end in ends if not any(_ends(path, end) for path in (*others, *self.elsewhere)))
            target = next(fits, None)
            if target is None or len(self.fused_with(name)) > 1:
                return None
            found[target] = None
        return tuple(found)

    def matches(self, name: str, target: str) -> bool:
        """Whether `target` is the module of `name` as PEFT's target_modules name it: a path's last parts."""
        return _ends(self.modules[name], target)


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _whole(site: str) -> bool:
    return site.endswith(".out")

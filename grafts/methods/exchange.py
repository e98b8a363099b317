"""What a method's file says of Hugging Face PEFT's folders: which config means the method, and where PEFT keeps its
tensors. Torch-free; used for configs that users write (`grafts/grammar.py`) and for folders (`grafts/formats/peft.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.methods.declare import SiteShape

Config = Mapping[str, object]
TOKENS_FIELD = "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class Kept:
    """One of our tensors in PEFT's file: under `key` in its `of`, the module by default, or the model where all sites
    share it, with two axes the other way round (`turned`) and then in another `shape`, which its slot may decide. Or
    `coded`: functions of the tensor and its place to PEFT's, and back. `{n}` in a key is the module's number among
    those of the graft.

    `rows` says that the first axis is along the outputs of the module, so that PEFT's tensor of a fused module holds
    those of its projections; without it, they all have the same one. `padded`: PEFT's may have fewer ranks, ours are
    zero then.
    """

    key: str
    turned: tuple[int, int] | None = None
    shape: tuple[int, ...] | Callable[..., tuple[int, ...]] | None = None
    coded: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    rows: bool = False
    padded: bool = False
    of: Literal["module", "model", "file"] = "module"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Packed:
    """Tensors that PEFT keeps otherwise than one for one: `pack(values, layout, module)` gives PEFT's by key from ours
    by name, `unpack(stored, layout, module)` ours from PEFT's. `layout` is `sizes.tensors` of the graft, `module(site)`
    the key of a site's module. With `reads_backbone` both get the graft and the backbone's files, too."""

    pack: Callable[..., Mapping[str, Tensor]]
    unpack: Callable[..., Mapping[str, Tensor]]
    reads_backbone: bool = False


def _none(*_: object, **__: object) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peft:
    """A method as PEFT's `peft_type` keeps it.

    `names` gives the field and its default for our arguments that mean the same; others are made by `fields` (from all
    our arguments) and by `arguments` (from the config, of which it reads `reads`). A config means this method when its
    `fixed` fields have these values, those that it does not say being false; its `needs` must have theirs. `idle`
    fields, with their defaults, are about training or starting values alone: who submits a job may not change them, a
    folder may, but for those with only some `harmless` values. `only` limits a layout to folders or to jobs.

    `sides` are the arguments that say where, with the field and default that PEFT has for each: the first names all
    modules, another some of them. `patterns` are the fields that give single modules another value of a field. With
    `layered` the config can choose layers by number, and `topmost` is the field for how many of the last ones. `own`
    and `shared` say where tensors are, by part, or `packed` does; parts that are in none of them are not kept, and zero
    when they come back. Where PEFT's method changes biases, too, `shift(stored, module, slot, number)` is what it adds
    to the outputs of a site's module and the keys that nothing else reads, or None; `number` gives the backbone's own
    `weight` and `bias` (None where there is none). A job's `trains_biases` where there are some.

    What PEFT keeps of a module that is fused here (GPT-2's c_attn) is one graft for each of its projections where the
    method is `separable`: a row of dW depends on the tensors along the outputs by that row alone.
    """

    kind: str
    method: str
    names: Mapping[str, tuple[str, object]] = field(default_factory=dict)
    fields: Callable[..., Config] = _none
    arguments: Callable[[Config], Config] = _none
    reads: tuple[str, ...] = ()
    fixed: Config = field(default_factory=dict)
    needs: Config = field(default_factory=dict)
    idle: Config = field(default_factory=dict)
    harmless: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    sides: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=lambda: {"at": ("target_modules", ())})
    patterns: Mapping[str, str] = field(default_factory=dict)
    layered: bool = True
    topmost: str | None = None
    own: Mapping[str, Kept] = field(default_factory=dict)
    shared: Mapping[str, Kept] = field(default_factory=dict)
    packed: Packed | None = None
    shift: Callable[..., tuple[Tensor, set[str]] | None] | None = None
    trains_biases: bool = False
    separable: bool = False
    blank: Callable[[SiteShape], Mapping[str, tuple[int, ...]]] = _none  # zeros that PEFT keeps, too: shapes by key
    conv1d: bool = False  # whether PEFT has it on weights that lie transposed (GPT-2's), too
    only_on: tuple[str, ...] | None = None  # the architectures that PEFT has it on
    written: bool = True  # else a graft is written as the plainer one that it is (`formats/plain.py`)
    untied: bool = False  # where the head is tied to the embeddings, PEFT's graft is another one
    biases: bool = True  # with sides, whether PEFT can train the backbone's biases beside it
    only: Literal["folder", "job"] | None = None

    @property
    def edits_tokens(self) -> bool:
        """Whether PEFT can edit rows of the embeddings beside it: LoRA's config has the field, and its descendant's."""
        return self.kind in ("LORA", "ADALORA")

"""What a graft is made of: slots, each one op at some sites of a backbone. Torch-free values shared by every part.

A site applies its slots in one order (docs/architecture.md): rotate and affine on x, then W x plus the sum of branch,
sparse and delta, norm, bias, affine and rotate on y.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from polygraft.grafts.head import Head

Act = Literal["identity", "relu", "gelu", "silu", "tanh"]
Gating = Literal["none", "sigmoid", "softmax", "attention", "noise"]
Layers = tuple[int, ...] | None

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class SpecError(ValueError):
    """A graft description that cannot be built; the message names the field, the value and the choices."""


@dataclass(frozen=True, slots=True)
class DeclRef:
    """A declaration of `grafts/methods` by its name, and the arguments it is to be called with."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: str
    arguments: tuple[tuple[str, int | float | str], ...] = ()

    def keywords(self) -> dict[str, int | float | str]:
        return dict(self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """What every slot may say beside its op.

    `layers` limits it to some layers. `form` makes the op's operands out of other tensors than themselves (VeRA's two
    vectors become A and B), `start` gives the tensors other starting values than the op's own, `frozen` keeps them
    there.
    """

    layers: Layers = None
    form: DeclRef | None = None
    start: DeclRef | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch(_Slot):
    """y += scale * B act(A t + a), with t the site's input or its own output; A is [rank, in], B^T is [rank, out], and
    a [rank, 1] is there with `bias`. Where `first` or `last` is not 0, only as many tokens of the prompt's ends pass
    it, each once, and none that is generated (ReFT, Wu et al. 2024).

    LoRA (Hu et al. 2021, eq. 3) is act = identity; bottleneck adapters (Houlsby et al. 2019; He et al. 2022, table 1)
    have an activation, serial ones tap the output of a sublayer, parallel ones its input.

    With a `gate` the ranks are split evenly among `experts`, and every row weighs each expert's hidden values: y +=
    scale * B (w * act(A t)) with w = gate(G t), G [experts, in]: a sigmoid each, or a softmax over all, or over the
    `top` highest where that is not 0. With `attention` G is [rank, in], and the softmax is over the inner products of
    an expert's share of G t with its hidden values (AdapterFusion, Pfeiffer et al. 2021). With `noise` it is that, too:
    in training exp(G t / 2) z is added to A t, every z a normal number of its own, else nothing (PVeRA).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    rank: int
    scale: float = 1.0
    act: Act = "identity"
    tap: Literal["input", "output"] = "input"
    dropout: float = 0.0
    bias: bool = False
    gate: Gating = "none"
    experts: int = 1
    top: int = 0
    first: int = 0
    last: int = 0
    op: Literal["branch"] = "branch"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"rank: {self.rank} is not a size; give at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout: {self.dropout} is outside [0, 1)")
        if self.gate == "none" and (self.experts, self.top) != (1, 0):
            raise SpecError(f"experts: {self.experts} of a branch without a gate; choose sigmoid, softmax or attention")
        if self.gate == "noise" and (self.experts, self.act) != (1, "identity"):
            raise SpecError(f"gate: 'noise' of {self.experts} experts and act {self.act!r}; it takes 1 and 'identity'")
        if self.experts < 1 or self.rank % self.experts:
            raise SpecError(f"experts: {self.experts} do not share rank {self.rank} evenly")
        if not 0 <= self.top <= self.experts or (self.top and self.gate != "softmax"):
            raise SpecError(f"top: {self.top} of {self.experts} experts with gate {self.gate!r}; a softmax chooses")
        if self.gate != "none" and (self.dropout or self.bias):
            raise SpecError("gate: a gated branch has no dropout, since its gate reads the same input, and no bias")
        if min(ends := (self.first, self.last)) < 0 or (any(ends) and (self.tap != "output" or self.gate != "none")):
            raise SpecError(f"first, last: {ends} are not 0 or more tokens that a branch of an output has, ungated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(_Slot):
    """y = y * g + b on the site's output, or the same on its input; g starts at 1, b at 0 (IA3, SSF, BitFit).

    On the `rows` of W it is a scale of y before the projection's own bias (BOFT).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    scale: bool
    shift: bool
    side: Literal["in", "out", "rows"] = "out"
    op: Literal["affine"] = "affine"

    def __post_init__(self) -> None:
        if not (self.scale or self.shift):
            raise SpecError("affine: scale and shift are both false, so nothing would be trained; set one")
        if self.side == "rows" and self.shift:
            raise SpecError("affine: a shift of W's rows is one of the output; give side out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(_Slot):
    """y = m / ||W + dW||_row * y over the branches of the same graft at the site (DoRA, Liu et al. 2024, eq. 5)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    op: Literal["norm"] = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class KV(_Slot):
    """`length` trained rows before every layer's keys and values (prefix tuning, Li & Liang 2021); `aside`, every row
    attends to them in a softmax of their own and no position is theirs (LLaMA-Adapter, Zhang et al. 2023).

    Rows aside with a `gate` join the one softmax, their keys and values times the row's own gate(G x) with x the input
    of attention, G [experts, hidden]; the rows are split evenly among `experts` (UniPELT, Mao et al. 2022).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    length: int
    at: str = "kv"
    aside: bool = False
    gate: Gating = "none"
    experts: int = 1
    op: Literal["kv"] = "kv"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prefix length: {self.length} is not a size; give at least 1")
        if self.gate in ("attention", "noise"):
            raise SpecError(f"gate: {self.gate!r} of prefix rows, which have no hidden values; sigmoid or softmax")
        if self.gate != "none" and not self.aside:
            raise SpecError(f"gate: {self.gate!r} of rows that stand in the cache, where all read the same; set aside")
        if self.experts < 1 or self.length % self.experts or (self.gate == "none" and self.experts != 1):
            raise SpecError(f"experts: {self.experts} with gate {self.gate!r} do not share {self.length} rows evenly")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(_Slot):
    """y += x G(theta)^T with a dense dW = G(theta), made from the tensors of `form` at its site and freed after use."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    op: Literal["delta"] = "delta"

    def __post_init__(self) -> None:
        if self.form is None:
            raise SpecError("form: a delta needs the form that generates its dense matrix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse(_Slot):
    """y += S x with S zero but for some trained entries of W's shape, or for some trained rows (`rows`).

    There are rank * (in + out) of them, as many as a LoRA has, or a share `density` of W's entries or rows. `pick`
    chooses at the start which they are.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    rank: int | None = None
    density: float | None = None
    rows: bool = False
    pick: DeclRef = DeclRef("random_entries")
    op: Literal["sparse"] = "sparse"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.density is None):
            raise SpecError(f"sparse: rank {self.rank} and density {self.density}; give one of them")
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank: {self.rank} is not a size; give at least 1")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise SpecError(f"density: {self.density} is outside (0, 1]")
        if self.rows and self.density is None:
            raise SpecError("rows: whole rows are counted by density; give it in place of rank")

    def count(self, d_in: int, d_out: int) -> int:
        """Entries or rows of S at a projection; raises SpecError when there are more than in W, or none."""
        whole = d_out if self.rows else d_in * d_out
        count = int(whole * self.density) if self.density is not None else (self.rank or 0) * (d_in + d_out)
        if not 1 <= count <= whole:
            field = f"rank: {self.rank}" if self.density is None else f"density: {self.density}"
            raise SpecError(
                f"{field} means {count} of the {whole} {'rows' if self.rows else 'entries'} of a projection"
            )
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate(_Slot):
    """x <- x R before the projection, or y <- y R after it, R starting at the identity.

    `blocks` (x): m = `stages` block-diagonal factors with blocks of `size`, shuffled as in a butterfly (OFT, Qiu et al.
    2023; BOFT, Liu et al. 2024). `lowrank` (x): 1 + A^T B of rank `size` (HRA, Yuan et al. 2024). `pairs` (y): channels
    turned two by two, halves of groups of `size` (RoAd, Liao & Monz 2024).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    at: str
    kind: Literal["blocks", "lowrank", "pairs"]
    size: int
    stages: int = 1
    op: Literal["rotate"] = "rotate"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SpecError(f"size: {self.size} is not a size; give at least 1")
        if not 1 <= self.stages <= 16 or (self.stages > 1 and self.kind != "blocks"):
            raise SpecError(f"stages: {self.stages}; blocks have 1 to 16, others 1")

    @property
    def side(self) -> Literal["in", "out"]:
        return "out" if self.kind == "pairs" else "in"

    def check(self, width: int) -> None:
        """Raise SpecError unless channels of that `width` can be grouped."""
        chunk = self.size << (self.stages - 1)
        if self.kind != "lowrank" and width % chunk:
            raise SpecError(f"size: {chunk} channels turn together, which does not divide the {width} of a projection")
        if self.size % 2 and (self.kind == "pairs" or self.stages > 1):
            raise SpecError(f"size: {self.size} is odd; halves of it are paired or shuffled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(_Slot):
    """`length` trained rows in the input embeddings: `before` the sequence, as virtual tokens with positions of their
    own (prompt tuning, Lester et al. 2021); in `replace` of the rows of the tokens `ids` (textual inversion, Gal et al.
    2022); or row i to `add` to the i-th token's (DePT, Shi & Lipani 2024).

    With a `gate` the rows before are a sum of `experts` prompts P_j [length, hidden], sum_j w_j P_j, whose weights read
    x, the mean of the embeddings of the request's own tokens: `highest`, w is softmax(G x) where that is largest and 0
    elsewhere (SMoP, Choi et al. 2023); `relu`, w = relu(G x + a), and c [length, hidden] is added (IDPG, Wu et al.
    2022). In training the scores of `highest` are G x (1 + noise z), z ~ N(0, 1).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    length: int
    mode: Literal["before", "replace", "add"] = "before"
    ids: tuple[int, ...] = ()
    gate: Literal["none", "highest", "relu"] = "none"
    experts: int = 1
    noise: float = 0.0
    at: str = "embed"
    op: Literal["tokens"] = "tokens"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prompt length: {self.length} is not a size; give at least 1")
        if len(self.ids) != (self.length if self.mode == "replace" else 0) or len(set(self.ids)) < len(self.ids):
            raise SpecError(f"ids: {self.ids} are not the {self.length} different tokens whose rows are replaced")
        if any(id < 0 for id in self.ids):
            raise SpecError(f"ids: {min(self.ids)} is not a token")
        if self.gate == "none" and (self.experts, self.noise) != (1, 0.0):
            raise SpecError(f"experts: {self.experts} of a prompt without a gate; choose highest or relu")
        if self.gate != "none" and (self.mode != "before" or self.form is not None):
            raise SpecError(f"gate: {self.gate!r} weighs whole prompts before the sequence, of rows without a form")
        if self.experts < 1:
            raise SpecError(f"experts: {self.experts} is not a number of prompts; give at least 1")
        if self.noise < 0 or (self.noise and self.gate != "highest"):
            raise SpecError(f"noise: {self.noise} with gate {self.gate!r}; scores of highest take one of at least 0")


def source_names(of: str) -> tuple[str, ...]:
    """The names in `of`, joined by |: a graft's `name` or `name@version`, as a request's model."""
    names = tuple(name.strip() for name in of.split("|")) if of else ()
    for name in names:
        if not re.fullmatch(r"[a-z0-9-]{1,64}(@[1-9][0-9]{0,8})?", name):
            raise SpecError(f"of: {name!r} is not a graft's name or name@version; join several by |")
        if names.count(name) > 1:
            raise SpecError(f"of: {name!r} is named {names.count(name)} times; name a graft once")
    return names


Slot = Branch | Affine | Norm | KV | Delta | Sparse | Rotate | Tokens


@dataclass(frozen=True, slots=True)
class GraftSpec:
    """A graft's description: the text it was asked for with, the slots that text means, what happens to its tensors
    while it is trained (`hooks`), and the classifier that is trained with it, if any."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    method: str
    slots: tuple[Slot, ...]
    hooks: tuple[DeclRef, ...] = ()
    head: Head | None = None

    def __post_init__(self) -> None:
        if not self.slots:
            raise SpecError("peft: an empty union; name at least one method")
        modes = [slot.aside for slot in self.slots if isinstance(slot, KV)]
        if len(modes) > len(set(modes)):
            raise SpecError("peft: two prefixes in one graft; give one with the sum of their lengths")
        edits = [slot.mode for slot in self.slots if isinstance(slot, Tokens)]
        if len(edits) > len(set(edits)):
            raise SpecError("peft: two prompts of one kind in one graft; give one with the sum of their lengths")

    @property
    def sources(self) -> tuple[str, ...]:
        """The grafts that this one is made over or starts from, as they were named: `of` of its declarations."""
        calls = [*(call for slot in self.slots for call in (slot.form, slot.start) if call), *self.hooks]
        found = (name for call in calls for name in source_names(str(call.keywords().get("of", ""))))
        return tuple(dict.fromkeys(found))

    @property
    def plain(self) -> GraftSpec:
        """As it is served: no slot has a form but deltas, whose dense matrix exists while it is multiplied with, and no
        branch has noise."""
        return replace(self, slots=tuple(map(_served, self.slots)), hooks=())

    @property
    def prefix_length(self) -> int:
        """Rows in the cache before a sequence, whose positions start here (as in PEFT)."""
        return next((slot.length for slot in self.slots if isinstance(slot, KV) and not slot.aside), 0)

    @property
    def virtual_length(self) -> int:
        """Virtual tokens that are rows of the sequence, after the prefix and before the prompt."""
        return next((slot.length for slot in self.slots if isinstance(slot, Tokens) and slot.mode == "before"), 0)

    @property
    def reads_prompt(self) -> bool:
        """Whether its virtual tokens are a function of the whole prompt. It then has to be computed in one piece, again
        after a preemption without what has been generated, and no keys of its tokens are those of another prompt."""
        return any(isinstance(slot, Tokens) and slot.gate != "none" for slot in self.slots)

    @property
    def prefix_cacheable(self) -> bool:
        """Whether the keys and values of a token depend on the graft and the tokens before it alone: not where virtual
        tokens are made of the whole prompt, nor where it counts which tokens are the prompt's."""
        return not self.reads_prompt and not any(isinstance(s, Branch) and (s.first or s.last) for s in self.slots)

    @property
    def draws(self) -> bool:
        """Whether a forward in training depends on random numbers."""
        dropped = any(isinstance(slot, Branch) and (slot.dropout or slot.gate == "noise") for slot in self.slots)
        return dropped or any(isinstance(slot, Tokens) and slot.noise for slot in self.slots)

    @property
    def context_length(self) -> int:
        """Positions before the prompt's first token."""
        return self.prefix_length + self.virtual_length

    @property
    def prefix_layers(self) -> Layers:
        """The layers that have prefix rows, None for all; in the others the virtual tokens are not seen."""
        return next((slot.layers for slot in self.slots if isinstance(slot, KV) and not slot.aside), None)

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, exclude=None if self.head else {"head"}).decode()

    @staticmethod
    def from_json(text: str | bytes) -> GraftSpec:
        """Inverse of `to_json`; raises SpecError naming the first bad field."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise SpecError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None


def _served(slot: Slot) -> Slot:
    slot = slot if isinstance(slot, Delta) or slot.form is None else replace(slot, form=None)
    return replace(slot, gate="none") if isinstance(slot, Branch) and slot.gate == "noise" else slot


_ADAPTER: TypeAdapter[GraftSpec] = TypeAdapter(GraftSpec)

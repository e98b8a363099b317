"""What can be said of a method without training it: derived from its slots and hooks, never declared twice.
Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.description import describe
from polygraft.grafts.methods.registry import find
from polygraft.grafts.sites import ModelShape, mergeable
from polygraft.grafts.spec import KV, Branch, DeclRef, GraftSpec, Slot, Tokens

# The backbone that sizes are quoted for: Touvron et al. 2023, table 2.
LLAMA_7B = ModelShape.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
)

# What an op's slots make of a graft, in the words of surveys; a graft of several kinds is a hybrid. The survey's family
# of a method is its folder.
_KINDS = {
    "affine": "scale and shift",
    "norm": "low rank",
    "kv": "prefix",
    "tokens": "soft prompt",
    "sparse": "selective",
    "rotate": "rotation",
    "delta": "generated",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A method with its default arguments. `summary`, `deviations` and `choose` are its words
    (`methods/description.py`), `parameters` the trainable ones on the shape asked for, and `frozen` counts the elements
    of its tensors that stay as they start.

    `mergeable`: folds into W. `prefix_cacheable`: the keys and values of a token depend on the graft and the tokens
    before it alone. `chunkable`: a prompt may be computed in pieces. `recompute_needs_prompt_len`: keys and values that
    were dropped depend on where the prompt ends, and not on the tokens alone.
    """

    name: str
    aliases: tuple[str, ...]
    paper: str
    summary: str
    deviations: str
    choose: str
    kind: str
    slots: tuple[str, ...]
    hooks: tuple[str, ...]
    parameters: int
    frozen: int
    mergeable: bool
    prefix_cacheable: bool
    chunkable: bool
    recompute_needs_prompt_len: bool


def entry(method: Method, shape: ModelShape = LLAMA_7B) -> Entry:
    """The catalogue's line for a method."""
    spec, words = default(method), describe(method)
    graft = BoundGraft(spec, shape)
    return Entry(
        name=method.name,
        aliases=method.aliases,
        paper=method.paper,
        summary=words.summary,
        deviations=words.deviations,
        choose=words.choose,
        kind=_kind(spec),
        slots=tuple(dict.fromkeys(_slot(slot) for slot in spec.slots)),
        hooks=tuple(call.name for call in spec.hooks),
        parameters=graft.parameters,
        frozen=graft.frozen,
        mergeable=mergeable(spec),
        prefix_cacheable=spec.prefix_cacheable,
        chunkable=not spec.reads_prompt,
        recompute_needs_prompt_len=needs_prompt_length(spec),
    )


def needs_prompt_length(spec: GraftSpec) -> bool:
    """Whether what it does to a token depends on where the prompt ends."""
    return spec.reads_prompt or any(isinstance(slot, Branch) and slot.last for slot in spec.slots)


def default(method: Method) -> GraftSpec:
    """The method with its default arguments; one that only says how others are trained stands beside LoRA."""
    slots, hooks = method.build({})
    return GraftSpec(method.name, slots or find("lora").build({})[0], hooks)


def fingerprint(method: Method) -> tuple[object, ...]:
    """What makes a method another one than its neighbours: for every slot the op and its fields but for sizes, its
    form, start and what is frozen; and the hooks. Sizes, factors and aliases do not count."""
    spec = default(method)
    places = BoundGraft(spec, LLAMA_7B).sites
    sites = {i: frozenset(site.name for index, site in places if index == i) for i in range(len(spec.slots))}
    return (
        tuple(_slot_print(slot, sites[i]) for i, slot in enumerate(spec.slots)),
        tuple(call.name for call in spec.hooks),
    )


def _slot_print(slot: Slot, sites: frozenset[str]) -> tuple[object, ...]:
    said = {field.name: getattr(slot, field.name) for field in fields(slot) if field.name != "at"}
    where = sites if slot.op == "affine" else frozenset()  # an affine is all in where it stands
    return (*((key, _words(value)) for key, value in said.items()), where)


def _words(value: object) -> object:
    """A field's value if it is a choice; of a declaration its name and those of its arguments that are."""
    if isinstance(value, DeclRef):
        return (value.name, *(_words(argument) for _, argument in value.arguments))
    return value if isinstance(value, str | bool) else None


def _slot(slot: Slot) -> str:
    said: list[str] = [slot.op]
    if isinstance(slot, Branch):
        said += [slot.tap] * (slot.tap != "input") + [slot.act] * (slot.act != "identity")
        said += [slot.gate] * (slot.gate != "none") + ["at ends"] * bool(slot.first or slot.last)
    if isinstance(slot, Tokens) and slot.gate != "none":
        said += [slot.gate]
    if isinstance(slot, KV) and slot.aside:
        said += ["aside"] + [slot.gate] * (slot.gate != "none")
    said += [f"form {slot.form.name}"] if slot.form else []
    said += [f"start {slot.start.name}"] if slot.start else []
    said += ["frozen"] if slot.frozen else []
    return " ".join(said)


def _kind(spec: GraftSpec) -> str:
    if any(isinstance(slot, Branch) and slot.gate == "softmax" for slot in spec.slots):
        return "mixture"
    kinds = {
        ("low rank" if slot.act == "identity" else "adapter") if isinstance(slot, Branch) else _KINDS[slot.op]
        for slot in spec.slots
    }
    rest = kinds - {"scale and shift"} or kinds  # biases and scales beside another op are a part of it
    return next(iter(rest)) if len(rest) == 1 else "hybrid"

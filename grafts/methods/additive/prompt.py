"""Prompts in the input embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Rank, Rows
from polygraft.grafts.sites import EMBED_SITE
from polygraft.grafts.spec import DeclRef, Slot, SpecError, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

_STARTS = ("text", "vocabulary", "normal")
_MOST_TOKENS = 1 << 20
_CELLS = range(4)  # of an LSTM of two layers and two directions
_WIDE = DeclRef("normal", (("std", 1.0),))


def prompt(length: Rows = 20, start: str = "text") -> tuple[Slot, ...]:
    """Trained rows P before the embeddings of a sequence, [P; E(x)] (Lester et al. 2021, arXiv 2104.08691, section 2).

    `start`: the embeddings of the first sample's tokens, of random tokens, or random numbers. On an image backbone it
    is visual prompt tuning in its shallow form, which `vpt` means here; VPT-deep, with other rows in every layer, is
    nearest to `prefix`.

    Deviations: The paper trains with Adafactor at a rate of 0.3 and starts from class labels or common tokens; here
    AdamW, and a sample's text.

    Choose when: the smallest graft is wanted, or the backbone is large: below ten billion parameters others learn more.
    Its rows take context.
    """
    if start not in _STARTS:
        raise SpecError(f"peft: start: {start!r} is unknown; choices: {', '.join(_STARTS)}")
    made = {"text": None, "vocabulary": DeclRef("sampled-tokens"), "normal": _WIDE}[start]
    return (Tokens(length=length, start=made),)


def p_tuning(length: Rows = 20, hidden: int = 128, encoder: str = "mlp") -> tuple[Slot, ...]:
    """Virtual tokens that an encoder makes of a trained embedding while they are trained: a network of three layers, or
    an LSTM of two with one of two behind it (Liu et al. 2021, arXiv 2103.10385, eq. 4 of its first version).

    Deviations: The rows stand before the input alone, as in PEFT, and not between a template's words; the encoder of
    the first version is the LSTM, of both directions, as here.

    Choose when: `prompt` depends too much on its start. What is served is the rows.
    """
    if encoder not in ("mlp", "lstm"):
        raise SpecError(f"peft: encoder: {encoder!r} is unknown; choices: mlp, lstm")
    return (Tokens(length=length, form=DeclRef(f"p-tuning-{encoder}", (("hidden", _size("hidden", hidden)),))),)


def dept(length: Rows = 10, rows: int = 64, r: Rank = 8, ratio: float = 60.0) -> tuple[Slot, ...]:
    """DePT: [P; E(x) + A B], a prompt P shorter by what A B of rank r is added to the embeddings of the first `rows`
    tokens, and two learning rates (Shi & Lipani 2024, arXiv 2309.05173, section 2.2).

    `ratio` is how many times as fast the prompt learns as the pair A, B: the job's learning rate is the prompt's. With
    the defaults they are 3e-2 and 5e-4.

    Deviations: P starts as the embeddings of the first sample's tokens; the paper's rates, for T5, are 0.3 to 0.5 and
    1e-4 to 1e-3.

    Choose when: prompt tuning is wanted at a lower cost of serving, since the rows before a sequence are fewer. It is
    as sensitive to its learning rates as prompt tuning; lora learns more with less search.
    """
    if ratio <= 0:
        raise SpecError(f"peft: dept.ratio: {ratio} is not a factor; give a positive number")
    low = DeclRef("low-rank-rows", (("r", _size("r", r)), ("std", 0.0)))
    return (Tokens(length=length), Tokens(length=rows, mode="add", form=low))


def _two_rates(ratio: float = 60.0, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("dept", (("ratio", ratio),)),)


def _slower_pair(tensor: TensorSpec, ratio: float) -> float:
    """The pair's share of the learning rate; a LoRA beside has its A and B at other sites."""
    own = tensor.site is not None and tensor.site.name == EMBED_SITE
    return 1 / ratio if own and tensor.part in "AB" else 1.0


def trainable_tokens(ids: str = "1|2") -> tuple[Slot, ...]:
    """New rows for given tokens in the table of embeddings, all others as they are: textual inversion (Gal et al. 2022,
    arXiv 2208.01618, eq. 2), in PEFT trainable tokens.

    `ids`: numbers of tokens, or ranges of them as 3-7, joined by `|`.

    Deviations: Only the input's rows are edited: where the head is tied to the embeddings, it keeps the old ones.

    Choose when: a few special tokens are to mean something, mostly beside another method.
    """
    found = _numbers(ids)
    return (Tokens(length=len(found), mode="replace", ids=found),)


def _numbers(ids: str) -> tuple[int, ...]:
    """The tokens that a text names."""
    found: list[int] = []
    for part in ids.split("|"):
        first, joined, last = (one.strip() for one in part.partition("-"))
        if not (first.isdecimal() and (last if joined else first).isdecimal() and len(first + last) < 20):
            raise SpecError(f"peft: ids: {ids[:200]!r} are not numbers of tokens joined by |")
        numbers = range(int(first), int(last or first) + 1)
        if len(numbers) + len(found) > _MOST_TOKENS:
            raise SpecError(f"peft: ids: {ids[:200]!r} are more than {_MOST_TOKENS} tokens")
        found += numbers
    return tuple(found)


def _size(field: str, value: int) -> int:
    if value < 1:
        raise SpecError(f"peft: {field}: {value} is not a size; give at least 1")
    return value


def _mlp_own(slot: Tokens, place: SiteShape, hidden: int) -> Mapping[str, TensorDecl]:
    width = place.d_out
    return {"E": TensorDecl((slot.length, width), _WIDE), **_layers((width, hidden, hidden, width))}


def _mlp(slot: Tokens, values: Mapping[str, Tensor], lowering: Lowering, hidden: int) -> Mapping[str, Tensor]:
    return {"p": _network(values["E"], values, 3)}


def _lstm_own(slot: Tokens, place: SiteShape, hidden: int) -> Mapping[str, TensorDecl]:
    width = place.d_out
    cells: dict[str, TensorDecl] = {}
    for cell in _CELLS:
        cells |= {
            f"Wi{cell}": TensorDecl((4 * hidden, width if cell < 2 else 2 * hidden), "kaiming"),
            f"Wh{cell}": TensorDecl((4 * hidden, hidden), "kaiming"),
            f"bi{cell}": TensorDecl((4 * hidden,)),
            f"bh{cell}": TensorDecl((4 * hidden,)),
        }
    return {"E": TensorDecl((slot.length, width), _WIDE), **cells, **_layers((2 * hidden, 2 * hidden, width))}


def _lstm(slot: Tokens, values: Mapping[str, Tensor], lowering: Lowering, hidden: int) -> Mapping[str, Tensor]:
    import torch

    E = values["E"]
    weights = [values[f"{part}{cell}"] for cell in _CELLS for part in ("Wi", "Wh", "bi", "bh")]
    begin = E.new_zeros(len(_CELLS), 1, hidden)
    # With biases, two layers, no dropout, not training, both directions, batch first.
    found = torch.lstm(E[None], (begin, begin), weights, True, 2, 0.0, False, True, True)[0]
    return {"p": _network(found[0], values, 2)}


def _layers(widths: tuple[int, ...]) -> dict[str, TensorDecl]:
    """Weights and biases of linear layers between `widths`."""
    found: dict[str, TensorDecl] = {}
    for i, (before, after) in enumerate(pairwise(widths), 1):
        found |= {f"W{i}": TensorDecl((after, before), "kaiming"), f"b{i}": TensorDecl((after,))}
    return found


def _network(x: Tensor, values: Mapping[str, Tensor], layers: int) -> Tensor:
    """Linear layers with ReLU between them."""
    for i in range(1, layers + 1):
        x = x @ values[f"W{i}"].T + values[f"b{i}"]
        x = x.relu() if i < layers else x
    return x


def _low_own(slot: Tokens, place: SiteShape, r: int, std: float) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.length, _size("r", r)), "kaiming"),
        "B": TensorDecl((r, place.d_out), DeclRef("normal", (("std", std),))),
    }


def _low(slot: Tokens, values: Mapping[str, Tensor], lowering: Lowering, r: int, std: float) -> Mapping[str, Tensor]:
    return {"p": values["A"] @ values["B"]}


def _sampled(tensor: TensorSpec, making: Making) -> Tensor:
    """Embeddings of tokens drawn at random, as PEFT's SAMPLE_VOCAB."""
    import torch

    count = len(making.backbone.embedding)
    return making.embedded(torch.randint(0, count, (tensor.shape[0],), generator=making.generator(tensor.name)))


METHODS = (
    Method("prompt", "arXiv 2104.08691", 3e-2, prompt, aliases=("prompt-tuning", "vpt")),
    Method("p-tuning", "arXiv 2103.10385", 1e-3, p_tuning),
    Method("dept", "arXiv 2309.05173", 3e-2, dept, hooks=_two_rates),
    Method("trainable-tokens", "arXiv 2208.01618", 5e-3, trainable_tokens, aliases=("textual-inversion",)),
)
PARAMETRIZATIONS = (
    Parametrization("p-tuning-mlp", _mlp, _mlp_own),
    Parametrization("p-tuning-lstm", _lstm, _lstm_own),
    Parametrization("low-rank-rows", _low, _low_own),
)
STARTS = (Start("sampled-tokens", _sampled),)
HOOKS = (Hook("dept", rate=_slower_pair),)
_INITS = {"normal": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}


def _start(config: Config) -> Config:
    found = [ours for ours, theirs in _INITS.items() if config.get("prompt_tuning_init", "RANDOM") == theirs]
    return {"start": found[0]} if found else {}


def _ids(config: Config) -> Config:
    found = config.get("token_indices")
    if not isinstance(found, list) or not found:
        raise SpecError(f"token_indices: {found!r} is not a list of tokens")
    return {"ids": "|".join(map(str, found))}


_LENGTH: dict[str, tuple[str, object]] = {"length": ("num_virtual_tokens", 20)}
_KEPT = {"p": Kept("prompt_embeddings", of="file")}
PEFT = (
    Peft(
        kind="PROMPT_TUNING",
        method="prompt",
        names=_LENGTH,
        fields=lambda start, **_: {"prompt_tuning_init": _INITS.get(start, "RANDOM")},
        arguments=_start,
        reads=("prompt_tuning_init",),
        idle={"prompt_tuning_init_text": None},
        sides={},
        layered=False,
        own=_KEPT,
    ),
    Peft(
        kind="P_TUNING",
        method="prompt",  # PEFT's files hold what the encoder made
        names=_LENGTH,
        idle=dict.fromkeys(
            (
                "encoder_reparameterization_type",
                "encoder_hidden_size",
                "encoder_num_layers",
                "encoder_dropout",
            )
        ),
        sides={},
        layered=False,
        own=_KEPT,
        only="folder",
    ),
    Peft(
        kind="TRAINABLE_TOKENS",
        method="trainable-tokens",
        fields=lambda ids, **_: {"token_indices": [*_numbers(ids)]},
        arguments=_ids,
        reads=("token_indices", "target_modules"),
        idle={"init_weights": True},
        sides={},
        layered=False,
        own={"p": Kept("trainable_tokens_delta")},
        untied=True,
    ),
    Peft(
        kind="P_TUNING",
        method="p-tuning",
        names=_LENGTH | {"hidden": ("encoder_hidden_size", 128)},
        arguments=lambda config: {"encoder": str(config.get("encoder_reparameterization_type", "MLP")).lower()},
        reads=("encoder_reparameterization_type",),
        idle={"encoder_num_layers": 2, "encoder_dropout": None},
        sides={},
        layered=False,
        only="job",
    ),
)

"""Context-aware prompt tuning: virtual tokens that stay near a context's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Hook, Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import DeclRef, Slot, SpecError, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]
_CHANGE = "context_change"  # a part's name that no other method has, since the hook knows its tensors by it
_WIDTH = 2048  # of the model that the paper's epsilons are for
_STAYS = 1e-10  # PEFT's radius of a label's ball


def cpt(
    length: Rows = 20, ids: str = "", types: str = "", epsilon: float = 0.1, format_epsilon: float = 0.1
) -> tuple[Slot, ...]:
    """Context-aware prompt tuning: virtual tokens that start as the embeddings E of a context's own tokens and may move
    within a ball around each, P = E + D with |D_i| <= epsilon_i sqrt(width / 2048); after every step D is projected
    back (Blau et al. 2024, arXiv 2410.17222). The survey's CPT, continual prompt tuning, is another method and not
    here.

    `ids` are the context's tokens, joined by `|`, else the first sample's, repeated to `length`; `types` as many types,
    all 1 if not given: by i mod 4, as in PEFT, 1 and 3 are format, 2 is input, and 0 is a label, whose row stays E.

    Deviations: The loss is of the job's own tokens alone: the context's labels are not learned again, and no example
    weighs less for its distance, so PEFT's configs that ask for either are refused.

    Choose when: a good few-shot context is at hand and the data are so few that free prompts overfit.
    """
    tokens = _numbers("ids", ids)
    length = len(tokens) or length
    kinds = _numbers("types", types)
    if types and len(kinds) != length:
        raise SpecError(f"peft: cpt.types: {len(kinds)} of {length} tokens; give each one")
    if min(epsilon, format_epsilon) <= 0:
        raise SpecError(f"peft: cpt.epsilon, format_epsilon: {epsilon}, {format_epsilon}; give numbers over 0")
    form = DeclRef("cpt", (("ids", ids), *_ball(types, epsilon, format_epsilon)))
    return (Tokens(length=length, form=form),)


def _hooks(types: str = "", epsilon: float = 0.1, format_epsilon: float = 0.1, **_: object) -> tuple[DeclRef, ...]:
    return (DeclRef("cpt", _ball(types, epsilon, format_epsilon)),)


def _ball(types: str, epsilon: float, format_epsilon: float) -> tuple[tuple[str, float | str], ...]:
    return (("types", types), ("epsilon", epsilon), ("format_epsilon", format_epsilon))


def _own(slot: Tokens, place: SiteShape, ids: str, **_: object) -> Mapping[str, TensorDecl]:
    shape = (slot.length, place.d_out)
    start = DeclRef("embedded-tokens", (("ids", ids),)) if ids else "embedded"
    return {"context": TensorDecl(shape, start, trained=False), _CHANGE: TensorDecl(shape)}


def _operands(  # noqa: PLR0913
    slot: Tokens, values: Values, lowering: Lowering, ids: str, types: str, epsilon: float, format_epsilon: float
) -> Values:
    """The change inside its ball; its gradient is that of the sum, and none in a label's row."""
    change = values[_CHANGE]
    moves = change.new_tensor([[float(kind > 0)] for kind in _kinds(types, len(change))])
    inside = _projected(change.detach(), types, epsilon, format_epsilon)
    return {"p": values["context"] + inside + moves * (change - change.detach())}


def _project(  # noqa: PLR0913
    values: Values,
    gradients: Values,
    step: int,
    total: int,
    types: str,
    epsilon: float,
    format_epsilon: float,
) -> None:
    for name, change in values.items():
        if name.endswith(f".{_CHANGE}"):
            change.copy_(_projected(change, types, epsilon, format_epsilon))


def _projected(change: Tensor, types: str, epsilon: float, format_epsilon: float) -> Tensor:
    radii = _radii(change, types, epsilon, format_epsilon)
    inside: Tensor = change * (radii / change.norm(dim=1, keepdim=True).maximum(radii))
    return inside


def _radii(change: Tensor, types: str, epsilon: float, format_epsilon: float) -> Tensor:
    """[length, 1], as PEFT rounds them to float32."""
    import torch

    width = torch.tensor(change.shape[1] / _WIDTH).sqrt()
    balls = (torch.tensor(_STAYS), format_epsilon * width, epsilon * width, format_epsilon * width)
    return torch.stack([balls[kind] for kind in _kinds(types, len(change))]).unsqueeze(1).to(change)


def _kinds(types: str, length: int) -> list[int]:
    """What each token is, from 0 to 3."""
    return [kind % 4 for kind in _numbers("types", types) or [1] * length]


def _numbers(field: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split("|")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise SpecError(f"peft: cpt.{field}: {text!r} are not numbers joined by |")
    return [int(part) for part in parts]


def _embedded(tensor: TensorSpec, making: Making, ids: str) -> Tensor:
    import torch

    tokens, count = _numbers("ids", ids), len(making.backbone.embedding)
    if max(tokens) >= count:
        raise SpecError(f"peft: cpt.ids: {max(tokens)} is not one of the {count} tokens")
    return making.embedded(torch.tensor(tokens))


METHODS = (Method("cpt", "arXiv 2410.17222", 3e-3, cpt, hooks=_hooks),)
PARAMETRIZATIONS = (Parametrization("cpt", _operands, _own),)
STARTS = (Start("embedded-tokens", _embedded),)
HOOKS = (Hook("cpt", after_step=_project),)


def _arguments(config: Config) -> Config:
    ids, types = (config.get(field) or [] for field in ("cpt_token_ids", "cpt_tokens_type_mask"))
    if not isinstance(ids, list) or not ids or not isinstance(types, list):
        raise SpecError(f"cpt_token_ids, cpt_tokens_type_mask: {ids!r}, {types!r} are not lists of numbers")
    if any(isinstance(kind, int) and kind > 0 and kind % 4 == 0 for kind in types):
        raise SpecError("cpt_tokens_type_mask: a label in the context has a loss in PEFT and none here; remove them")
    return {"ids": "|".join(map(str, ids)), "types": "|".join(map(str, types))}


PEFT = (
    Peft(
        kind="CPT",
        method="prompt",  # PEFT's files hold the sum
        names={"length": ("num_virtual_tokens", 20)},
        idle=dict.fromkeys(
            (
                "cpt_token_ids",
                "cpt_mask",
                "cpt_tokens_type_mask",
                "opt_weighted_loss_type",
                "opt_loss_decay_factor",
                "opt_projection_epsilon",
                "opt_projection_format_epsilon",
            )
        ),
        sides={},
        layered=False,
        own={"p": Kept("prompt_embeddings", of="file")},
        only="folder",
    ),
    Peft(
        kind="CPT",
        method="cpt",
        names={"epsilon": ("opt_projection_epsilon", 0.1), "format_epsilon": ("opt_projection_format_epsilon", 0.1)},
        arguments=_arguments,
        reads=("cpt_token_ids", "cpt_tokens_type_mask", "cpt_mask", "num_virtual_tokens"),
        needs={"opt_weighted_loss_type": "none"},
        idle={"opt_loss_decay_factor": 1.0},
        sides={},
        layered=False,
        only="job",
    ),
)

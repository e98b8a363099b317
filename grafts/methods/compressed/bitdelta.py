"""BitDelta (Liu et al. 2024, arXiv 2402.10193): the difference of a fine-tuned model from its backbone in one bit an
element. `grafts/formats/bitdelta.py` makes the graft, `grafts/distil.py` trains its scales; 24 signs lie in one number,
which float32 holds exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from polygraft.grafts.methods.composition.warm_start import go_on_hooks
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Projections
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.sizes import TensorSpec

WORD = 24  # signs a number


def bitdelta(at: Projections = "linear", *, of: str = "") -> tuple[Slot, ...]:
    """BitDelta: dW = a sign(W_tuned - W), one bit an element of W and a scale a for every matrix, the mean size of the
    difference at first (Liu et al. 2024, arXiv 2402.10193, section 3.1).

    The signs are those of a fine-tuned model: `polygraft grafts bitdelta FOLDER NAME` makes the graft of it, and with
    `--distil` trains its scales as the paper does, so that the logits are the fine-tuned model's. A job goes on from
    such a graft, `of=NAME`, and trains the scales on its own examples.

    Deviations: the projections of the layers alone; what a fine-tuned model changed elsewhere (embeddings, norms,
    head), which the paper keeps beside the bits, is not in the graft. A job's loss is of its tokens and not of logits.

    Choose when: there is a fine-tuned model already, and it is to be served beside others on its backbone. To train
    from examples, take lora.
    """
    return (Delta(at=at, form=DeclRef("bitdelta")),)


def _hooks(at: str = "linear", *, of: str = "") -> tuple[DeclRef, ...]:
    return go_on_hooks(of=of) if of else ()


def _own(slot: Delta, place: SiteShape) -> Mapping[str, TensorDecl]:
    signs = (place.d_out, -(-place.d_in // WORD))
    return {"a": TensorDecl((1,)), "signs": TensorDecl(signs, "tuned_signs", trained=False)}


def _operands(slot: Delta, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"W": values["a"] * unpacked(values["signs"], lowering.place.d_in).to(values["a"].dtype)}


def packed(change: Tensor) -> Tensor:
    """[out, in / 24] numbers that say which elements of [out, in] are positive."""
    import torch
    from torch.nn import functional as F

    bits = F.pad((change > 0).long(), (0, -change.shape[1] % WORD)).view(len(change), -1, WORD)
    return (bits << torch.arange(WORD)).sum(-1).float()


def unpacked(signs: Tensor, width: int) -> Tensor:
    """[out, width] of +1 and -1."""
    import torch

    bits = signs.long().unsqueeze(-1) >> torch.arange(WORD, device=signs.device) & 1
    return 2 * bits.flatten(1)[:, :width] - 1


def _check(tensor: TensorSpec, graft: BoundGraft, *_: object) -> None:
    if not any(call.name == "from" for call in graft.spec.hooks):
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise SpecError(
        "of: bitdelta starts from the signs of a fine-tuned model; make a graft of one with `polygraft grafts bitdelta "
        "FOLDER NAME`, which can be asked as it is, and to train its scales write bitdelta(of=NAME)"
    )


METHODS = (Method("bitdelta", "arXiv 2402.10193", 1e-4, bitdelta, hooks=_hooks),)
PARAMETRIZATIONS = (Parametrization("bitdelta", _operands, _own),)
STARTS = (Start("tuned_signs", _refuse, _check),)

"""What the bare backbone does on a job's first samples: the inputs of its projections, and the gradients of their
frozen weights. For starting values that are made from data; a weight still never changes. What is found is handed out
on the CPU, where starting values are made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import SpecError

SAMPLES = 64  # of a job's samples, its first ones, are looked at

Seen = Callable[[Site, Tensor], None]


def observe(backbone: Backbone, samples: Sequence[Sequence[int]], sites: Collection[Site], seen: Seen) -> None:
    """DeclRef `seen(site, x)` with the input x [rows, in] of each projection, in float32 or wider, sample by sample."""
    for ids in samples[:SAMPLES]:

        def note(site: Site, module: nn.Module, x: Tensor, y: Tensor, rows: int = len(ids)) -> None:
            seen(site, _wide(x[0, :rows]).cpu())

        with torch.inference_mode(), _watched(backbone, sites, note):
            hidden_states(backbone, ids, trainable=False)


def gradients(
    backbone: Backbone,
    samples: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    sites: Collection[Site],
    *,
    squared: bool = False,
) -> Mapping[Site, Tensor]:
    """dL/dW [out, in] of each projection, L the mean next-token loss over the samples by the weights of their tokens
    (all 1 where `weights` has none).

    With `squared`, the sum of the squares of the samples' own gradients: the diagonal of the empirical Fisher
    information, but for a factor.
    """
    wide = torch.promote_types(backbone.dtype, torch.float32)
    found = {site: torch.zeros(_shape(backbone, site), dtype=wide, device=backbone.device) for site in sites}
    for ids, factor in _weighted(samples, weights):

        def note(site: Site, module: nn.Module, x: Tensor, y: Tensor, rows: int = len(ids) - 1) -> None:
            source = x.detach()[0, :rows]

            def collect(slope: Tensor) -> None:
                own = _wide(slope[0, :rows]).T @ _wide(source)
                found[site].add_(own.square() if squared else own)

            y.register_hook(collect)  # type: ignore[no-untyped-call]

        with torch.enable_grad(), _watched(backbone, sites, note):
            backward(backbone, hidden_states(backbone, ids[:-1], trainable=True), _token_loss(ids, factor))
    return {site: gradient.cpu() for site, gradient in found.items()}


def graft_gradients(
    backbone: Backbone,
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    samples: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
) -> Mapping[str, Tensor]:
    """The gradient of the same loss under a graft without forms in the graft's own tensors, by name."""
    stacks = backbone.stacks((Resident("calibrated", graft, values),), trainable=True)
    for ids, factor in _weighted(samples, weights):
        with torch.enable_grad():
            hidden = hidden_states(backbone, ids[:-1], trainable=True, stacks=stacks)
            backward(backbone, hidden, _token_loss(ids, factor))
    pairs = zip(stacks.views[0], stacks.gradients()[0], strict=True)
    return {piece.tensor.name: slope.view(piece.tensor.shape).cpu() for piece, slope in pairs if slope is not None}


def _weighted(
    samples: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The first samples that have something to predict, with every prediction's share of the mean loss."""
    chosen = [ids for ids in samples[:SAMPLES] if len(ids) > 1]
    weighted = weights[:SAMPLES] or [(1.0,) * len(ids) for ids in samples[:SAMPLES]]
    factors = [torch.tensor(w[1:]) for w in weighted if len(w) > 1]
    total = float(sum(factor.sum() for factor in factors)) or 1.0
    for ids, factor in zip(chosen, factors, strict=True):
        yield ids, factor / total


def _token_loss(ids: Sequence[int], factor: Tensor) -> Callable[[Tensor], Tensor]:
    """The weighted loss of saying the next tokens, as a function of the logits."""

    def loss(logits: Tensor) -> Tensor:
        targets = torch.tensor(ids[1:]).to(logits.device)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return (losses * factor.to(logits.device)).sum()

    return loss


def backward(backbone: Backbone, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Run the backward of a loss of the logits through the layers; returns the loss."""
    logits = backbone.logits(hidden.detach()).requires_grad_()
    found = loss(logits)
    (slope,) = torch.autograd.grad(found, logits)
    slope = backbone.softcap_backward(slope, logits).to(hidden.dtype)
    hidden.backward(backbone.head.transposed_product(slope))  # type: ignore[no-untyped-call]
    return found.detach()


def hidden_states(backbone: Backbone, ids: Sequence[int], *, trainable: bool, stacks: Stacks | None = None) -> Tensor:
    """Hidden states of the bare backbone, or under the one graft of `stacks`."""
    if backbone.shape.images or backbone.shape.encoder_layers:
        raise SpecError(f"peft: this method starts from a job's text, and {backbone.shape.arch} reads other things")
    builder = RowBuilder()
    builder.add(ids, graft=None if stacks is None else 0)
    stacks = stacks or backbone.stacks((), trainable=trainable)
    return backbone.forward(builder.rows(), stacks, builder.attention(backbone.shape))


@contextmanager
def _watched(
    backbone: Backbone, sites: Collection[Site], note: Callable[[Site, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """DeclRef `note` with the input and output [1, padded rows, width] of the projections while they run."""
    with ExitStack() as handles:
        for site in sites:

            def hook(module: nn.Module, args: tuple[Tensor], y: Tensor, site: Site = site) -> None:
                note(site, module, args[0], y)

            handles.enter_context(backbone.projections[site].register_forward_hook(hook))
        yield


def _shape(backbone: Backbone, site: Site) -> tuple[int, int]:
    d_in, d_out = backbone.shape.dims(site.name)
    return d_out, d_in


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

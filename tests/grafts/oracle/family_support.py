"""Methods that learn which entries, rows or biases of W to train, from their papers' equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from polygraft.launch.demo.oracle.naive import Hook, Parts
from tests.grafts.oracle.family_sparse import placed, sparse_update
from tests.grafts.oracle.row import Row


def changed(change: Callable[[Parts], Tensor]) -> Hook:
    """W' = W + dW."""

    def hook(module: nn.Module, parts: Parts) -> None:
        module.register_forward_hook(lambda _, args, y: y + args[0] @ change(parts).T)

    return hook


def shifted(shift: Callable[[Parts], Tensor]) -> Hook:
    """W x + b."""

    def hook(module: nn.Module, parts: Parts) -> None:
        module.register_forward_hook(lambda _, args, y: y + shift(parts))

    return hook


def trained_rows() -> Hook:
    """Only the weights of the learner nodes change: W'_j = W_j + dW_j (Vucetic et al. 2022, section 3)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        rows = parts["i"].detach().long()[:, 0]

        def forward(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            out = y.clone()
            for place, row in enumerate(rows.tolist()):
                out[..., row] = out[..., row] + args[0] @ parts["w"][place]
            return out

        module.register_forward_hook(forward)

    return hook


def hard_concrete(logits: Tensor, u: Tensor | None = None) -> Tensor:
    """z = min(1, max(0, 3 s - 1.5)), s = sigma(log u - log(1 - u) + a), without the noise where there is no u (Guo et
    al. 2021, section 3.1; Louizos et al. 2018)."""
    noise = 0.0 if u is None else torch.log(u) - torch.log(1 - u)
    return (torch.sigmoid(noise + logits) * 3.0 - 1.5).clamp(0, 1)


def sensitive(rank_scale: float) -> Mapping[int, Hook]:
    """A LoRA where a matrix was chosen, sensitive entries elsewhere (He et al. 2023, section 3)."""
    return {
        0: changed(lambda p: rank_scale * p["chosen"] * p["B"].T @ p["A"]),
        1: sparse_update(lambda p: p["sensitive"] * p["w"]),
    }


def gates(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates on both sides of their kinks, whole matrices' ajar, and not fixed."""
    for name, value in values.items():
        if name.endswith("diff_fixed"):
            value.zero_()
        if name.endswith("diff_group"):
            value.abs_().add_(0.1)
    return values


ROWS: Mapping[str, Row] = {
    "fishmask": Row(
        "fishmask(density=0.03, room=2)", hooks=lambda: {0: sparse_update(lambda p: p["chosen"] * p["w"])}, fixed=placed
    ),
    "moving-mask": Row(
        "moving-mask(density=0.01, pool=3, at=attn.*)", hooks=lambda: {0: sparse_update()}, fixed=placed
    ),
    "moved-rows": Row("moved-rows(density=0.2)", hooks=lambda: {0: trained_rows()}, fixed=placed),
    "moved-rows everywhere": Row(
        "moved-rows(density=0.1, at=linear)@1", hooks=lambda: {0: trained_rows()}, fixed=placed
    ),
    "spt": Row("spt(r=2, alpha=6)", hooks=lambda: sensitive(3.0), fixed=placed),
    "lt-sft": Row("lt-sft(at=attn.*)", hooks=lambda: {0: changed(lambda p: p["stays"] * p["change"])}),
    "diff-pruning": Row(
        "diff-pruning(at=attn.[qv]|ffn.down)",
        hooks=lambda: {0: changed(lambda p: p["diff_kept"] * hard_concrete(p["diff_gate"]) * p["diff"])},
        fixed=gates,
    ),
    "diff-pruning by groups": Row(
        "diff-pruning(at=attn.[qv]|ffn.down, structured=1)",
        hooks=lambda: {
            0: changed(
                lambda p: p["diff_kept"] * hard_concrete(p["diff_group"]) * hard_concrete(p["diff_gate"]) * p["diff"]
            )
        },
        fixed=gates,
    ),
    "child-tuning": Row("child-tuning(at=attn.[qv])", hooks=lambda: {0: changed(lambda p: p["child"])}),
    "s-bitfit": Row("s-bitfit", hooks=lambda: {0: shifted(lambda p: p["bias_stays"] * p["b"])}),
}

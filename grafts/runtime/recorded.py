"""What rows of one sequence leave in the bare backbone, or read there, when they run through it by themselves."""

from __future__ import annotations

from torch import Tensor, nn

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows
from polygraft.grafts.sites import BLOCK_SITE, Site, module_path


def keys_and_values(backbone: Backbone, rows: Rows) -> dict[int, tuple[Tensor, Tensor]]:
    """Those of the rows [T, kv_width] in each layer that they pass, rotary applied; differentiable in
    `inputs_embeds`."""
    return backbone.recorded(rows).of_rows(len(rows))


def states(backbone: Backbone, rows: Rows, layer: int) -> Tensor:
    """What a layer reads of the rows, [T, hidden]."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][0, : len(rows)])

    module = backbone.base.get_submodule(module_path(Site(layer, BLOCK_SITE), backbone.shape))
    with module.register_forward_pre_hook(note):
        backbone.recorded(rows)
    return seen[0]

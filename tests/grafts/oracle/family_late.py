"""A prompt that enters at a layer: transformers' model runs twice, once over the input for what that layer reads, once
over as many rows more, of which the layer is given the prompt and what the first run said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from polygraft.launch.demo.oracle.plain import Oracle, Place, plain_model
from tests.grafts.oracle.row import Row, Values


def late(layer: int) -> Callable[[Path, Values, torch.dtype], Oracle]:
    """H^L = layers_{L..}([P; H]), H what layer L reads of the input alone (Liu et al. 2022, arXiv 2210.11292, section
    3). The input's positions begin after the prompt's, below the layer too."""

    def make(folder: Path, values: Values, dtype: torch.dtype) -> Oracle:
        model = plain_model(folder, dtype)
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        (P,) = leaves.values()

        def logits(ids: Tensor) -> Tensor:
            below: list[Tensor] = []
            positions = torch.arange(len(P), len(P) + len(ids))[None]
            with layers(model)[layer].register_forward_pre_hook(lambda _, args: below.append(args[0])):
                model(input_ids=ids[None], position_ids=positions, use_cache=False)

            def entered(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return torch.cat([P[None], below[0]], 1), *args[1:]

            whole = torch.cat([ids[:1].expand(len(P)), ids])  # the first are replaced before anything reads them
            with layers(model)[layer].register_forward_pre_hook(entered):
                found: Tensor = model(input_ids=whole[None], use_cache=False).logits[0, len(P) :]
            return found

        return Oracle(logits, {name: Place(leaf) for name, leaf in leaves.items()})

    return make


def layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == model.config.num_hidden_layers)


ROWS: Mapping[str, Row] = {
    "lpt": Row("lpt(5)@1", model=late(1)),
    "lpt through all layers": Row("lpt(4)", model=late(0)),
}

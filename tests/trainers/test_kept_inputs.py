"""What a training forward keeps of a projection's input: nothing where no branch there has a trained A (LoRA-FA, Zhang
et al. 2023, arXiv 2308.03303, section 3: of the activations A x alone)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pretrained import Quantise
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from tests.grafts.oracle.row import random_tensors

ROWS = 200  # of one sequence; a multiple of the forward's grain
OURS = ("_ProjectBackward", "_BranchBackward")


@pytest.fixture(params=["fp32", "bf16", "nf4"])
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    quantise: Quantise | None = "nf4" if request.param == "nf4" else None
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    return Backbone.load(folder, dtype, training=True, quantise=quantise)


@pytest.mark.parametrize("text", ["lora-fa(r=2)", "lora-fa(r=2, dropout=0.1)"])
def test_a_pack_of_lora_fa_keeps_nothing_of_an_inputs_size(text: str, backbone: Backbone) -> None:
    """Of every projection: q, k and v together, o, gate and up together, down."""
    width = backbone.shape.hidden
    assert max(tensor.numel() for tensor in kept(backbone, text)) < ROWS * width
    plain = [tensor for tensor in kept(backbone, text.replace("-fa", "")) if tensor.shape[0] == ROWS]
    assert len(plain) >= 4 * backbone.shape.layers


def test_beside_a_lora_an_input_is_kept_once_for_both(backbone: Backbone) -> None:
    inputs = [tensor for tensor in kept(backbone, "lora-fa(r=2)", "lora(r=2)") if tensor.shape[0] == ROWS]
    assert len(inputs) == 4 * backbone.shape.layers


def kept(backbone: Backbone, *texts: str) -> Iterator[Tensor]:
    """What the projections and branches of a forward over one sequence, all of it under every graft, hold."""
    residents = [
        Resident(text, graft := BoundGraft(parse(text), backbone.shape), wide(random_tensors(graft, i)))
        for i, text in enumerate(texts)
    ]
    rows = Rows(
        torch.arange(ROWS) % 500,
        torch.arange(ROWS),
        tuple(Span(0, ROWS, graft) for graft in range(len(texts))),
        torch.arange(ROWS, dtype=torch.int32),
    )
    stacks = backbone.stacks(residents, trainable=True)
    hidden = backbone.forward(rows, stacks, WholeSequences(((0, ROWS),), backbone.shape))
    waiting, seen = [hidden.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if node.name() in OURS:
                values = [value for own in getattr(node, "kept", ()) for value in own]
                yield from (one for one in (*node.saved_tensors, *values) if one is not None)  # type: ignore[attr-defined]


def wide(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in values.items()}

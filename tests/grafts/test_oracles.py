"""Every method computes what PEFT, or its paper's equation on plain transformers, computes: logits and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.padding import padded
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import Row, random_tensors, relative
from tests.grafts.oracle.table import METHODS, MORE

LENGTHS = (7, 20)
# Ours and the oracle's float32 differ by the order of their sums; in float64 nothing but rounding may be left.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def backbone(request: pytest.FixtureRequest, tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, request.param)


@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_logits_and_gradients_are_the_oracles(name: str, backbone: Backbone) -> None:
    row = {**METHODS, **MORE}[name]
    values = random_tensors(row.graft(backbone.shape), seed=3)
    prompts, slopes = batch(backbone)
    oracle = row.oracle(backbone.folder, values, backbone.dtype)
    expected = [oracle.logits(ids) for ids in prompts]
    sum((logits * slope).sum() for logits, slope in zip(expected, slopes, strict=True)).backward()  # type: ignore[union-attr]

    logits, gradients = ours(row, values, backbone, prompts, slopes)

    for found, wanted in zip(logits, expected, strict=True):
        assert relative(found, wanted) < TOLERANCE[backbone.dtype]
    wanted_gradients = oracle.gradients()
    assert gradients.keys() == wanted_gradients.keys() == values.keys()
    for tensor, wanted in wanted_gradients.items():
        assert wanted.norm() > 0, f"{tensor} plays no part"
        assert relative(gradients[tensor], wanted) < TOLERANCE[backbone.dtype], tensor


def test_rows_without_a_graft_pass_the_bare_model(backbone: Backbone) -> None:
    (ids, _), _ = batch(backbone)
    expected = plain_model(backbone.folder, backbone.dtype)(ids[None]).logits[0]
    rows = Rows(ids, torch.arange(len(ids)), ())
    with torch.inference_mode():
        hidden = backbone.forward(rows, backbone.stacks([]), WholeSequences(((0, len(ids)),), backbone.shape))
        assert relative(backbone.logits(hidden), expected) < TOLERANCE[backbone.dtype]


def batch(backbone: Backbone) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of every sequence, and a random slope of the loss in every one of its logits."""
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, backbone.shape.vocab, (n,), generator=generator) for n in LENGTHS]
    slopes = [torch.randn(n, backbone.shape.vocab, generator=generator).to(backbone.dtype) for n in LENGTHS]
    return prompts, slopes


def ours(
    row: Row, values: dict[str, Tensor], backbone: Backbone, prompts: list[Tensor], slopes: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits and gradients of the two sequences in one forward."""
    graft = row.graft(backbone.shape)
    stacks = backbone.stacks([Resident("g", graft, values)], trainable=True)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    positions = torch.cat([torch.arange(n) + graft.prefix_length for n in LENGTHS])
    rows = Rows(torch.cat(prompts), positions, (Span(0, len(positions), 0),))
    attention = WholeSequences(tuple(zip(starts, LENGTHS, strict=True)), backbone.shape)
    hidden = backbone.forward(rows, stacks, attention)
    with torch.no_grad():
        logits = backbone.logits(hidden)
    slope = F.pad(torch.cat(slopes), (0, 0, 0, padded(len(hidden)) - len(hidden)))
    hidden.backward(backbone.head.transposed_product(slope)[: len(hidden)])  # logits = hidden W^T
    found = {piece.tensor.name: piece.gradient() for piece in stacks.views[0]}
    gradients = {name: g.view(values[name].shape) for name, g in found.items() if g is not None}
    return list(logits.split(LENGTHS)), gradients

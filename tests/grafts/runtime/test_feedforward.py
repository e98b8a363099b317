"""Gate and up as one tensor: where no graft follows their product, with the bits of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime import feedforward, modules
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.modules import SiteLinear
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from tests.grafts.oracle.row import random_tensors
from tests.tiny import tiny_llama

ROWS = 24
MIXES: Mapping[tuple[str, ...], bool] = {
    ("lora(r=2)", "parallel(2)"): True,
    ("lora(r=2)", "lora(r=2, dropout=0.1)"): False,
    ("ia3", "lora(r=2)"): True,
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), request.param, training=True)


@pytest.mark.parametrize("texts", MIXES, ids=" and ".join)
def test_as_one_tensor_they_have_the_bits_of_two(
    texts: tuple[str, ...], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def joined(members: Sequence[SiteLinear], x: Tensor) -> Tensor | None:
        both = modules.joined(members, x)
        found.append(both is not None)
        return both

    monkeypatch.setattr(feedforward, "joined", joined)
    gradients = trained(backbone, texts)
    assert set(found) == {MIXES[texts]}
    monkeypatch.setattr(feedforward, "joined", lambda *_: None)
    apart = trained(backbone, texts)
    assert gradients and all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, apart, strict=True))


def trained(backbone: Backbone, texts: tuple[str, ...]) -> list[Tensor]:
    """The states of a forward, half of its rows under each graft, and the gradients of all stacks."""
    grafts = [BoundGraft(parse(text), backbone.shape) for text in texts]
    values = [{name: value.float() for name, value in random_tensors(g, n).items()} for n, g in enumerate(grafts)]
    stacks = backbone.stacks([Resident(*made) for made in zip(texts, grafts, values, strict=True)], trainable=True)
    half = ROWS // 2
    spans = tuple(Span(n * half, (n + 1) * half, n) for n in range(2))
    order = torch.arange(ROWS)
    rows = Rows(order + 3, order % half, spans, order.int())
    leaves = list(stacks.leaves())
    hidden = backbone.forward(rows, stacks, WholeSequences(((0, half), (half, half)), backbone.shape))
    hidden.float().square().sum().backward()
    return [hidden.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

"""A graft folded into the weights of the plain transformers model computes what it computes beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.merge import Fold
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import mergeable
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import MODULES, plain_llama
from tests.grafts.oracle.row import Row, Values, random_tensors, relative
from tests.grafts.oracle.table import ALL, MORE

# What no method of the table does: affines of norms and sublayers, and linear branches on a sublayer's output.
CORNERS = {
    "norms": Row("bitfit(at=norm.[12]) + ia3(at=norm.2|attn.k, feedforward=attn.q|ffn.down)"),
    "sublayers": Row("serial(3, act=identity) + ia3(at=ffn.out|attn.o, feedforward=) + bitfit(at=*.out|ffn.down)"),
    "gone on from another": Row("lora(r=2, alpha=3) + from(of=a)"),
    "dora beside others": Row("dora(r=3) + loha(r=2, at=attn.q) + bitfit + ia3(at=norm.1)"),
}
EVERY = ALL | MORE | CORNERS  # type: ignore[operator]


@pytest.fixture(scope="module")
def fp64(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64)


@pytest.mark.equality("merged", rows=EVERY)
@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if mergeable(row.spec)])
def test_the_plain_model_with_merged_weights_is_the_graft(name: str, fp64: Backbone) -> None:
    row = EVERY[name]
    values, ids = row.values(fp64.shape, seed=9), torch.arange(5, 29)
    model = plain_llama(fp64.folder, torch.float64)
    bare = model(ids[None]).logits[0]
    before = {site: fp64.weight(site).clone() for site in fp64.linears}
    fold = Fold(row.graft(fp64.shape), values, fp64.weight)
    for site in fold.sites:
        merged = fold.at(site)
        linear = model.model.layers[site.layer].get_submodule(MODULES[site.name])
        linear.weight = nn.Parameter(merged.weight)
        linear.bias = None if merged.bias is None else nn.Parameter(merged.bias)
    expected = unmerged(row.graft(fp64.shape), values, fp64, ids)
    assert relative(bare, expected) > 1e-3
    assert relative(model(ids[None]).logits[0], expected) < 1e-9
    assert all(torch.equal(fp64.weight(site), weight) for site, weight in before.items())


@pytest.mark.parametrize("text", ["serial(4)", "prefix(2)", "lora + parallel(4)", "parallel(4, act=identity)"])
def test_what_is_not_affine_is_refused(text: str, fp64: Backbone) -> None:
    graft = BoundGraft(parse(text), fp64.shape)
    with pytest.raises(SpecError, match="cannot be folded"):
        Fold(graft, random_tensors(graft, seed=0), fp64.weight)


def test_a_projections_own_bias_is_scaled_and_shifted(fp64: Backbone) -> None:
    graft = BoundGraft(parse("ia3(at=attn.k, feedforward=) + bitfit(at=attn.k)@1"), fp64.shape)
    values = random_tensors(graft, seed=1)
    own = torch.linspace(-1, 1, fp64.shape.kv_width, dtype=torch.float64)
    fold = Fold(graft, values, fp64.weight, lambda site: own)
    assert [site.layer for site in fold.sites] == [0, 1]
    for site in fold.sites:
        merged = fold.at(site)
        expected = values[f"0.{site}.g"] * own + values.get(f"1.{site}.b", 0)
        assert merged.bias is not None and torch.allclose(merged.bias, expected, rtol=1e-14)


def unmerged(graft: BoundGraft, values: Values, backbone: Backbone, ids: Tensor) -> Tensor:
    stacks = backbone.stacks([Resident("r", graft, values)])
    rows = Rows(ids, torch.arange(len(ids)), (Span(0, len(ids), 0),))
    with torch.no_grad():
        hidden = backbone.forward(rows, stacks, WholeSequences(((0, len(ids)),), backbone.shape))
        return backbone.logits(hidden)

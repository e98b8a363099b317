"""Grafts made of grafts: soups, and weighted sums found without gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.compose import combined, lorahub, soup
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import random_tensors

LORA = parse("lora(r=2, alpha=4, at=attn.[qv])")


@pytest.fixture(scope="module")
def fp64(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64)


def layout(backbone: Backbone) -> tuple[TensorSpec, ...]:
    return BoundGraft(LORA, backbone.shape).tensors


def members_of(backbone: Backbone, count: int) -> list[dict[str, Tensor]]:
    return [random_tensors(BoundGraft(LORA, backbone.shape), seed) for seed in range(count)]


def test_a_soup_is_the_mean_and_of_one_graft_the_graft(fp64: Backbone) -> None:
    members = members_of(fp64, 3)
    found = soup(layout(fp64), members)
    for name, value in found.items():
        assert torch.allclose(value, (members[0][name] + members[1][name] + members[2][name]) / 3, rtol=1e-14)
    assert all(torch.equal(soup(layout(fp64), members[:1])[name], value) for name, value in members[0].items())


def test_weights_multiply_both_factors_as_in_lorahub(fp64: Backbone) -> None:
    """m = (w_1 A_1 + w_2 A_2)(w_1 B_1 + w_2 B_2) (Huang et al. 2023, eq. 1)."""
    first, second = members_of(fp64, 2)
    found = combined(layout(fp64), [first, second], [0.7, -0.4])
    A, B = (0.7 * first[f"0.1.attn.q.{part}"] - 0.4 * second[f"0.1.attn.q.{part}"] for part in "AB")
    assert torch.allclose(found["0.1.attn.q.B"].T @ found["0.1.attn.q.A"], B.T @ A, rtol=1e-12)


def test_lorahub_finds_weights_that_are_there_to_be_found(fp64: Backbone) -> None:
    members, hidden = members_of(fp64, 3), (0.9, -0.5, 0.3)
    target = combined(layout(fp64), members, hidden)

    def loss(values: dict[str, Tensor]) -> float:
        return sum(float((values[name] - wanted).square().mean()) for name, wanted in target.items())

    found = lorahub(layout(fp64), members, loss, steps=200, penalty=0.0)  # type: ignore[arg-type]
    assert found.weights == pytest.approx(hidden, abs=0.02) and found.loss == loss(dict(found.tensors)) < 1e-4
    shrunk = lorahub(layout(fp64), members, loss, steps=200, penalty=0.05)  # type: ignore[arg-type]
    assert sum(map(abs, shrunk.weights)) < sum(map(abs, found.weights))


def test_lorahub_keeps_to_its_steps_and_bounds(fp64: Backbone) -> None:
    seen: list[dict[str, Tensor]] = []

    def loss(values: dict[str, Tensor]) -> float:
        seen.append(values)
        return -float(sum(value.abs().sum() for value in values.values()))  # the larger the better

    found = lorahub(layout(fp64), members_of(fp64, 2), loss, steps=30, penalty=0.0)  # type: ignore[arg-type]
    assert len(seen) <= 30 and max(map(abs, found.weights)) <= 1.5
    assert found.loss == min(-float(sum(v.abs().sum() for v in values.values())) for values in seen)


def test_members_that_do_not_fit_are_refused(fp64: Backbone) -> None:
    members = members_of(fp64, 2)
    with pytest.raises(SpecError, match="weights: 1 for 2 grafts"):
        combined(layout(fp64), members, [1.0])
    with pytest.raises(SpecError, match="grafts of one spec"):
        soup(layout(fp64), [members[0], random_tensors(BoundGraft(parse("bitfit"), fp64.shape), 0)])


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("shira(r=1, at=attn.q)", "0.0.attn.q.i"),
        ("vera(r=2, at=attn.q)", "0.shared.A"),
        ("lora-fa(r=2, at=attn.q)", "0.0.attn.q.A"),
    ],
)
def test_what_is_not_trained_must_be_the_same_in_all_members(text: str, fixed: str, fp64: Backbone) -> None:
    graft = BoundGraft(parse(text), fp64.shape)
    made, other, again = (initialise(graft, fp64, seed=seed, samples=()) for seed in (0, 1, 0))
    places = graft.tensors
    with pytest.raises(SpecError, match=f"members: {fixed} is not trained and differs"):
        soup(places, [made, other])
    trained = {tensor.name for tensor in places if tensor.trained}
    moved = {name: value + 1 if name in trained else value for name, value in again.items()}
    for name, value in soup(places, [made, moved]).items():
        assert torch.allclose(value, made[name] + 0.5 if name in trained else made[name], rtol=1e-14)
    going = BoundGraft(parse(f"{text} + from(of=a|b)"), fp64.shape)
    sources = {"a": Source(graft, made), "b": Source(graft, other)}
    with pytest.raises(SpecError, match=f"{fixed} is not trained"):
        initialise(going, fp64, seed=2, samples=(), sources=sources)
    sources["b"] = Source(graft, moved)
    started = initialise(going, fp64, seed=2, samples=(), sources=sources)
    assert all(started[name].equal(value) for name, value in soup(places, [made, moved]).items())

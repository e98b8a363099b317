"""Grafts made of grafts: soups, weighted sums found without gradients, and experts behind a trained gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polygraft.cluster.launch.demo.oracle.naive import naive
from polygraft.grafts.compose import combined, experts, lorahub, soup
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sizes import parameters, tensors
from polygraft.grafts.spec import GraftSpec, SpecError
from tests.grafts.oracle.family_mixes import molora
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.test_merge import unmerged
from tests.grafts.test_methods import batch, judged, ours

LORA = parse("lora(r=2, alpha=4, at=attn.[qv])")


@dataclass(frozen=True)
class Given:
    """In place of a row of the table: a spec that no text says."""

    spec: GraftSpec


@pytest.fixture(scope="module")
def fp64(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64)


def members_of(backbone: Backbone, count: int) -> list[dict[str, Tensor]]:
    return [random_tensors(LORA, backbone.shape, seed) for seed in range(count)]


def test_a_soup_is_the_mean_and_of_one_graft_the_graft(fp64: Backbone) -> None:
    members = members_of(fp64, 3)
    found = soup(members)
    for name, value in found.items():
        assert torch.allclose(value, (members[0][name] + members[1][name] + members[2][name]) / 3, rtol=1e-14)
    assert all(torch.equal(soup(members[:1])[name], value) for name, value in members[0].items())


def test_weights_multiply_both_factors_as_in_lorahub(fp64: Backbone) -> None:
    """m = (w_1 A_1 + w_2 A_2)(w_1 B_1 + w_2 B_2) (Huang et al. 2023, eq. 1)."""
    first, second = members_of(fp64, 2)
    found = combined([first, second], [0.7, -0.4])
    A, B = (0.7 * first[f"0.1.attn.q.{part}"] - 0.4 * second[f"0.1.attn.q.{part}"] for part in "AB")
    assert torch.allclose(found["0.1.attn.q.B"].T @ found["0.1.attn.q.A"], B.T @ A, rtol=1e-12)


def test_lorahub_finds_weights_that_are_there_to_be_found(fp64: Backbone) -> None:
    members, hidden = members_of(fp64, 3), (0.9, -0.5, 0.3)
    target = combined(members, hidden)

    def loss(values: dict[str, Tensor]) -> float:
        return sum(float((values[name] - wanted).square().mean()) for name, wanted in target.items())

    found = lorahub(members, loss, steps=200, penalty=0.0)  # type: ignore[arg-type]
    assert found.weights == pytest.approx(hidden, abs=0.02) and found.loss == loss(dict(found.tensors)) < 1e-4
    shrunk = lorahub(members, loss, steps=200, penalty=0.05)  # type: ignore[arg-type]
    assert sum(map(abs, shrunk.weights)) < sum(map(abs, found.weights))


def test_lorahub_keeps_to_its_steps_and_bounds(fp64: Backbone) -> None:
    seen: list[dict[str, Tensor]] = []

    def loss(values: dict[str, Tensor]) -> float:
        seen.append(values)
        return -float(sum(value.abs().sum() for value in values.values()))  # the larger the better

    found = lorahub(members_of(fp64, 2), loss, steps=30, penalty=0.0)  # type: ignore[arg-type]
    assert len(seen) <= 30 and max(map(abs, found.weights)) <= 1.5
    assert found.loss == min(-float(sum(v.abs().sum() for v in values.values())) for values in seen)


@pytest.mark.parametrize("top", [2, 3])
def test_experts_behind_a_gate_are_the_papers_mixture(top: int, fp64: Backbone) -> None:
    """o = W x + sum over the top k of w_i B_i A_i x (Xu et al. 2024, section 3.1); only the gate has a gradient."""
    spec, values = experts(LORA, members_of(fp64, 3), top=top, seed=5)
    prompts, slopes = batch(fp64)
    oracle = naive(fp64.folder, {0: molora(3, 2.0, top=top)}, values, fp64.dtype)
    expected, wanted = judged(oracle, prompts, slopes)
    found, gradients = ours([(Given(spec), values)], fp64, prompts, slopes)  # type: ignore[list-item]
    assert relative(found, expected) < 1e-9
    assert {name.rpartition(".")[2] for name in gradients} == {"G"}
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name]) < 1e-9, name
    assert parameters(spec, fp64.shape) == sum(t.numel for t in tensors(spec, fp64.shape) if t.part == "G")


def test_equal_experts_are_the_one_lora_whatever_the_gate_says(fp64: Backbone) -> None:
    (member,) = members_of(fp64, 1)
    spec, values = experts(LORA, [member, member], top=0)
    ids = torch.arange(4, 24)
    assert relative(unmerged(spec, values, fp64, ids), unmerged(LORA, member, fp64, ids)) < 1e-12


def test_a_mixture_is_saved_and_read_again(fp64: Backbone, tmp_path: Path) -> None:
    spec, values = experts(LORA, members_of(fp64, 2))
    identity = native.save(tmp_path, spec, values, shape=fp64.shape, backbone="b")
    assert native.load(tmp_path / identity, shape=fp64.shape, backbone="b").spec == spec


def test_members_that_do_not_fit_are_refused(fp64: Backbone) -> None:
    members = members_of(fp64, 2)
    with pytest.raises(SpecError, match="weights: 1 for 2 grafts"):
        combined(members, [1.0])
    with pytest.raises(SpecError, match="grafts of one spec"):
        soup([members[0], random_tensors(parse("bitfit"), fp64.shape, 0)])
    with pytest.raises(SpecError, match="is no LoRA"):
        experts(parse("serial(4)"), [random_tensors(parse("serial(4)"), fp64.shape, 0)])

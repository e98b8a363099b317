"""What methods start from: PEFT's own starting values where they are not random, numpy's factorisations elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from polygraft.cluster.launch.demo.oracle.plain import MODULES, plain_llama
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import LINEAR, relative

SITES = (Site(0, "attn.k"), Site(1, "ffn.up"), Site(1, "ffn.down"))
SAMPLES = ((5, 6, 7, 8), (9, 10, 11))


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


def started(text: str, backbone: Backbone) -> dict[str, Tensor]:
    return initialise(parse(text), backbone, seed=1, samples=SAMPLES)


def pefts(folder: Path, start: str) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=start)  # type: ignore[arg-type]
    return get_peft_model(plain_llama(folder, torch.float32), config)


def layer(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(f"base_model.model.model.layers.{site.layer}.{MODULES[site.name]}")


def product(values: dict[str, Tensor], slot: int, site: Site) -> Tensor:
    """B A [out, in] of a slot at a site."""
    return values[f"{slot}.{site}.B"].T @ values[f"{slot}.{site}.A"]


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_w_with_two_branches_is_pefts_residual_with_one(method: str, backbone: Backbone, tiny_folder: Path) -> None:
    """At the start and after A and B have moved: W + s (B A - B0 A0) = W_res + s B A."""
    model, values = pefts(tiny_folder, method), started(f"{method}(r=4, alpha=8)", backbone)
    for site in SITES:
        theirs = layer(model, site)
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight  # type: ignore[index,union-attr]
        residual = theirs.base_layer.weight  # type: ignore[union-attr]
        assert relative(product(values, 0, site), B @ A) < 1e-5  # type: ignore[operator]
        ours = backbone.weight(site) - 2.0 * product(values, 1, site)
        assert relative(ours, residual) < 1e-5  # type: ignore[arg-type]
        moved = {name: value + 0.1 * torch.randn_like(value) for name, value in values.items() if name[0] == "0"}
        ours = ours + 2.0 * product(moved, 0, site)
        trained = residual + 2.0 * moved[f"0.{site}.B"].T @ moved[f"0.{site}.A"]  # type: ignore[operator]
        assert relative(ours, trained) < 1e-5


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_a_shifted_start_leaves_the_backbones_function_and_both_factors_in_use(method: str, backbone: Backbone) -> None:
    values = started(f"{method}(r=4, alpha=8)", backbone)
    for site in SITES:
        assert torch.equal(product(values, 0, site), product(values, 1, site))
        assert product(values, 0, site).norm() > 0


def test_milora_takes_the_smallest_singular_triplets(backbone: Backbone) -> None:
    values = started("milora(r=4, alpha=8)", backbone)
    for site in SITES:
        U, S, Vh = np.linalg.svd(backbone.weight(site).double().numpy(), full_matrices=False)
        principal = torch.from_numpy((U[:, :-4] * S[:-4]) @ Vh[:-4])
        assert relative(backbone.weight(site) - 2.0 * product(values, 1, site), principal) < 1e-5


def test_lora_xs_frames_its_matrix_with_the_truncated_svd(backbone: Backbone) -> None:
    values = started("lora-xs(r=4)", backbone)
    for site in SITES:
        U, S, Vh = np.linalg.svd(backbone.weight(site).double().numpy(), full_matrices=False)
        assert relative(product(values, 0, site), torch.from_numpy((U[:, :4] * S[:4]) @ Vh[:4])) < 1e-5
        A = values[f"0.{site}.A"]
        assert relative(A @ A.T, torch.eye(4)) < 1e-5
        assert 0 < values[f"0.{site}.M"].std() < 2e-5


def test_mica_starts_from_pefts_minor_left_vectors_and_zero(backbone: Backbone, tiny_folder: Path) -> None:
    model, values = pefts(tiny_folder, "mica"), started("mica(r=4, alpha=8)", backbone)
    for site in SITES:
        B, theirs = values[f"0.{site}.B"].T, layer(model, site).lora_B["default"].weight  # type: ignore[index,union-attr]
        assert relative(B @ B.T, theirs @ theirs.T) < 1e-4  # type: ignore[operator,arg-type]
        assert not values[f"0.{site}.A"].any()


def test_an_orthogonal_start_changes_nothing_with_both_factors_as_large_as_pefts(
    backbone: Backbone, tiny_folder: Path
) -> None:
    model, values = pefts(tiny_folder, "orthogonal"), started("orthogonal(r=4, alpha=8)", backbone)
    for site in SITES:
        A, B = values[f"0.{site}.A"], values[f"0.{site}.B"]
        assert (B.T @ A).norm() < 1e-6 * A.norm() * B.norm()
        theirs = layer(model, site)
        for ours, name in ((A, "lora_A"), (B, "lora_B")):
            assert 0.7 < ours.norm() / getattr(theirs, name)["default"].weight.norm() < 1.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pissa(r=40)", "40 is more than the 32 ranks of W at 0.attn.k"),
        ("olora(at=ffn.out)", "ffn.out has no weight matrix"),
        ("orthogonal(r=3)", "3 is odd"),
    ],
)
def test_a_start_that_w_cannot_give_is_refused(text: str, message: str, backbone: Backbone) -> None:
    with pytest.raises(SpecError, match=message):
        started(text, backbone)

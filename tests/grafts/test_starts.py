"""What methods start from: PEFT's own starting values where they are not random, numpy's factorisations elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import MODULES, plain_llama
from tests.grafts.oracle.row import LINEAR, relative

SITES = (Site(0, "attn.k"), Site(1, "ffn.up"), Site(1, "ffn.down"))
SAMPLES = tuple(tuple(range(5 * i + 1, 5 * i + 14 - i % 3)) for i in range(12))
WEIGHTS = tuple((0.0, 0.0, *(1.0 + i % 2 for _ in ids[2:])) for i, ids in enumerate(SAMPLES))


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


def started(text: str, backbone: Backbone) -> dict[str, Tensor]:
    return initialise(BoundGraft(parse(text), backbone.shape), backbone, seed=1, samples=SAMPLES, weights=WEIGHTS)


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
        assert relative(product(values, 0, site), B @ A) < 1e-5
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
        assert relative(B @ B.T, theirs @ theirs.T) < 1e-4
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
        ("olora(at=ffn.out)", "names more than projections"),
        ("orthogonal(r=3)", "3 is odd"),
    ],
)
def test_a_start_that_w_cannot_give_is_refused(text: str, message: str, backbone: Backbone) -> None:
    with pytest.raises(SpecError, match=message):
        started(text, backbone)


@pytest.fixture(scope="module")
def read(tiny_folder: Path) -> dict[Site, list[Tensor]]:
    """What transformers' own projections read on the samples."""
    model, found = plain_llama(tiny_folder, torch.float64), dict[Site, list[Tensor]]()
    for site in SITES:

        def note(module: nn.Module, args: tuple[Tensor], y: Tensor, site: Site = site) -> None:
            found.setdefault(site, []).append(args[0][0])

        model.model.layers[site.layer].get_submodule(MODULES[site.name]).register_forward_hook(note)
    with torch.no_grad():
        for ids in SAMPLES:
            model(torch.tensor([ids]))
    return found


def test_eva_starts_from_the_principal_directions_of_the_inputs(
    backbone: Backbone, read: dict[Site, list[Tensor]]
) -> None:
    values = started("eva(r=4)", backbone)
    for site in SITES:
        rows = torch.cat(read[site]).numpy()
        expected = torch.from_numpy(np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4])
        assert relative((values[f"0.{site}.A"].double() * expected).sum(1).abs(), torch.ones(4)) < 1e-4
        assert not values[f"0.{site}.B"].any()


def test_eva_explains_at_least_as_much_of_the_inputs_as_pefts(
    backbone: Backbone, tiny_folder: Path, read: dict[Site, list[Tensor]]
) -> None:
    """No less variance than PEFT's, which is incremental, randomised and stops when it stands still."""
    config = LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(plain_llama(tiny_folder, torch.float32), config)
    batches = [{"input_ids": torch.tensor([ids])} for ids in SAMPLES]
    with torch.no_grad():
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    values = started("eva(r=4)", backbone)
    for site in SITES:
        rows = torch.cat(read[site])
        centred = rows - rows.mean(0)
        theirs = layer(model, site).lora_A["default"].weight.double()  # type: ignore[index,union-attr]
        found, reached = (float((centred @ A.double().T).square().sum()) for A in (values[f"0.{site}.A"], theirs))
        assert 0.8 * found <= reached <= 1.0001 * found


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_cordas_residual_is_pefts(mode: str, backbone: Backbone, tiny_folder: Path) -> None:
    model = plain_llama(tiny_folder, torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEAR,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),  # type: ignore[arg-type]
    )

    def run() -> None:
        for ids in SAMPLES:
            model(torch.tensor([ids]))

    preprocess_corda(model, config, run_model=run)
    theirs, values = get_peft_model(model, config), started(f"corda(r=4, alpha=8, mode={mode})", backbone)
    for site in SITES:
        ours = backbone.weight(site) - 2.0 * product(values, 1, site)
        assert relative(ours, layer(theirs, site).base_layer.weight) < 1e-4  # type: ignore[union-attr,arg-type]
        assert torch.equal(product(values, 0, site), product(values, 1, site))
        assert product(values, 1, site).norm() > 0.01 * backbone.weight(site).norm()


def test_lora_ga_starts_from_the_singular_vectors_of_the_gradient(backbone: Backbone, tiny_folder: Path) -> None:
    """Wang et al. 2024, algorithm 1, on transformers' own gradient of the weighted loss."""
    model, values = plain_llama(tiny_folder, torch.float64), started("lora-ga(r=4, gamma=9)", backbone)
    weights = {
        site: model.model.layers[site.layer].get_submodule(MODULES[site.name]).weight.requires_grad_() for site in SITES
    }
    total = sum(sum(w) for w in WEIGHTS)
    for ids, factors in zip(SAMPLES, WEIGHTS, strict=True):
        losses = nn.functional.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
        )
        ((losses * torch.tensor(factors[1:])).sum() / total).backward()
    for site in SITES:
        U, _, Vh = np.linalg.svd(weights[site].grad.numpy(), full_matrices=False)
        factor = len(U) ** 0.25 / 3.0
        for found, expected in ((values[f"0.{site}.A"], Vh[:4]), (values[f"0.{site}.B"], U.T[4:8])):
            along = (found.double() * torch.from_numpy(expected)).sum(1).abs()
            assert relative(along, factor * torch.ones(4)) < 1e-3
            assert relative(found.norm(dim=1), factor * torch.ones(4)) < 1e-5
        assert torch.equal(product(values, 0, site), product(values, 1, site))

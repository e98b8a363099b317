"""BitDelta: the signs and scales of a fine-tuned model's difference, and scales trained to give its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.distil import distil
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.bitdelta import bitdelta_of, left_out
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.lowering import Lowered
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import MODULES, plain_llama

SITES = (Site(0, "attn.v"), Site(1, "ffn.down"))
SAMPLES = ((5, 6, 7, 300, 21), (9, 10, 11), (400, 3, 3, 17, 90, 2, 8), (33, 60), (70, 71, 72, 1))


@pytest.fixture(scope="module")
def tuned_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a fine-tune of its projections and of one norm."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight") or name == "model.norm.weight":
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    for file in tiny_folder.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64, training=True)


@pytest.fixture(scope="module")
def tuned(tuned_folder: Path) -> Backbone:
    return Backbone.load(tuned_folder, torch.float64, training=True)


def test_a_tuned_model_becomes_signs_and_their_mean_size(backbone: Backbone, tuned: Backbone) -> None:
    """Liu et al. 2024, section 3.1: a sign(dW) with a = mean |dW|, the a for which |dW - a sign(dW)| is smallest."""
    graft, values = bitdelta_of(backbone.shape, backbone.weight, tuned.weight)
    made = Lowered(graft, backbone.weight)
    operands = made.make(values)
    for site in SITES:
        difference = tuned.weight(site) - backbone.weight(site)
        found = made.generator(0, site, values)(operands[f"0.{site}.t"])
        assert torch.equal(found.sign(), torch.where(difference > 0, 1.0, -1.0).to(found))
        assert torch.allclose(found.abs(), difference.abs().mean().to(found))
        for worse in (0.99, 1.01):
            assert (found - difference).norm() < (worse * found - difference).norm()
    with pytest.raises(SpecError, match="tuned W is"):
        bitdelta_of(backbone.shape, backbone.weight, lambda site: tuned.weight(site)[:-1])


def test_what_was_tuned_and_is_no_projection_is_named(tiny_folder: Path, tuned_folder: Path) -> None:
    base, tuned = BackboneFiles(tiny_folder), BackboneFiles(tuned_folder)
    graft, _ = bitdelta_of(base.shape, base.weight, tuned.weight, "attn.*")
    kept = set(left_out(graft, base, tuned))
    assert "model.norm.weight" in kept and "model.layers.0.mlp.down_proj.weight" in kept
    assert not any("self_attn" in name or "embed" in name for name in kept)


def test_scales_are_distilled_as_the_paper_says(backbone: Backbone, tuned: Backbone) -> None:
    """Liu et al. 2024, section 3.1: argmin over a of E |Z_tuned(x) - Z(x; a)|^2, by torch's Adam on transformers'
    models."""
    graft, values = bitdelta_of(backbone.shape, backbone.weight, tuned.weight)
    start = {name: value.double() for name, value in values.items()}
    found = distil(graft, start, backbone, tuned, SAMPLES, steps=6, batch=2, learning_rate=1e-3)

    teacher, student = plain_llama(tuned.folder, torch.float64), plain_llama(backbone.folder, torch.float64)
    scales = {site: start[f"0.{site}.a"].clone().requires_grad_() for _, site in graft.sites}
    for site, a in scales.items():
        signs = torch.where(tuned.weight(site) - backbone.weight(site) > 0, 1.0, -1.0).double()
        module = student.get_submodule(f"model.layers.{site.layer}.{MODULES[site.name]}")
        module.register_forward_hook(lambda _, args, y, a=a, signs=signs: y + a * (args[0] @ signs.T))
    optimiser = torch.optim.Adam(scales.values(), lr=1e-3)
    losses: list[float] = []
    batches = [SAMPLES[i : i + 2] for i in (0, 2, 4)] * 2
    for batch in batches:
        optimiser.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for ids in batch:
            with torch.no_grad():
                wanted: Tensor = teacher(torch.tensor([ids])).logits
            loss = loss + F.mse_loss(student(torch.tensor([ids])).logits, wanted) / len(batch)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert found.first == pytest.approx(losses[0], rel=1e-9) and found.last == pytest.approx(losses[-1], rel=1e-6)
    assert losses[3] < losses[0]  # the same batch
    for site, a in scales.items():
        assert float(found.tensors[f"0.{site}.a"]) == pytest.approx(float(a.detach()), rel=1e-6)
        assert torch.equal(found.tensors[f"0.{site}.signs"], start[f"0.{site}.signs"])


def test_without_a_fine_tuned_model_it_is_refused_with_what_to_do(backbone: Backbone, tuned: Backbone) -> None:
    with pytest.raises(SpecError, match=r"grafts bitdelta FOLDER NAME.*bitdelta\(of=NAME\)"):
        initialise(BoundGraft(parse("bitdelta"), backbone.shape), backbone, seed=0, samples=SAMPLES)
    graft, values = bitdelta_of(backbone.shape, backbone.weight, tuned.weight)
    source = {"tuned": Source(graft, values)}
    going_on = BoundGraft(parse("bitdelta(of=tuned)"), backbone.shape)
    started = initialise(going_on, backbone, seed=0, samples=SAMPLES, sources=source)
    assert all(torch.equal(started[name], value.double()) for name, value in values.items())

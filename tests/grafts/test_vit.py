"""Images: a vision transformer's classes and features are transformers' own, and grafts of many kinds share a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import merged, peft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.packing import assert_same_bits_in_company
from tests.tiny import tiny_model

TEXTS = ("lora(r=4)", "prompt(5)", "dora(r=2, at=attn.*)", "prefix(3)", "ssf", "houlsby(6)", "ia3")
PIXELS = torch.randn(7, 3, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("vit"), "vit")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
def test_classes_are_transformers_own(folder: Path, dtype: torch.dtype, tolerance: float, training: bool) -> None:
    theirs = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).eval()
    backbone = Backbone.load(folder, dtype, training=training)
    hidden, starts = forward(backbone, ["bare"] * 7, [])
    assert relative(backbone.logits(hidden[starts]), theirs(PIXELS.to(dtype)).logits) < tolerance


def test_without_a_head_the_features_are_transformers_own(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    backbone = Backbone.load(tmp_path, torch.float32)
    hidden, _ = forward(backbone, ["bare"] * 7, [])
    assert relative(backbone.logits(hidden), theirs(PIXELS).last_hidden_state.flatten(0, 1)) < 1e-5


def test_a_graft_of_a_model_with_a_head_fits_one_without(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    both = [Backbone.load(path, torch.float32) for path in (folder, tmp_path)]
    graft = BoundGraft(parse("lora"), both[0].shape)
    values = random_tensors(graft, seed=1)
    states = [forward(backbone, [0] * 7, [Resident("g", graft, values)])[0] for backbone in both]
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_has_the_same_bits_alone_and_in_company(one_thread: None, folder: Path, dtype: torch.dtype) -> None:
    backbone = Backbone.load(folder, dtype, training=True)
    assert_same_bits_in_company(lambda jobs: gradients(backbone, jobs), TEXTS)


def test_what_starts_from_text_is_refused(folder: Path) -> None:
    backbone = Backbone.load(folder, torch.float32)
    with pytest.raises(SpecError, match="vit reads other things"):
        initialise(BoundGraft(parse("lora-ga"), backbone.shape), backbone, seed=0, samples=((1, 2, 3),))
    with pytest.raises(SpecError, match="is not a token of this backbone; it has none"):
        BoundGraft(parse("trainable-tokens(1)"), backbone.shape)


def test_images_are_refused_by_a_backbone_of_text(tiny_folder: Path) -> None:
    with pytest.raises(SpecError, match="llama reads tokens"):
        Backbone.load(tiny_folder, torch.float32).patches(PIXELS)


def test_peft_loads_what_we_save(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, torch.float32)
    graft = BoundGraft(parse("lora(r=4, alpha=6)"), backbone.shape)
    values = random_tensors(graft, seed=6)
    hidden, starts = forward(backbone, [0] * 7, [Resident("g", graft, values)])
    expected = backbone.logits(hidden[starts])
    (tmp_path / "peft").mkdir()
    peft.export(tmp_path / "peft", graft, values)
    plain = AutoModelForImageClassification.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    assert relative(theirs(pixel_values=PIXELS).logits, expected) < 1e-5
    with pytest.raises(FormatError, match=r"k_proj.weight: is not in the backbone's files"):  # named as of old there
        merged.export(tmp_path / "merged", graft, values, backbone=folder)


def gradients(backbone: Backbone, jobs: tuple[int, ...]) -> list[list[Tensor]]:
    """Of each job's loss on one image, whose class is the job's number."""
    residents = []
    for job in jobs:
        graft = BoundGraft(parse(TEXTS[job]), backbone.shape)
        start = initialise(graft, backbone, seed=job, samples=())
        noise = random_tensors(graft, seed=job)
        residents.append(Resident(str(job), graft, {n: t + 0.1 * noise[n].float() for n, t in start.items()}))
    stacks = backbone.stacks(residents, trainable=True)
    rows, attention, starts = packed(backbone, list(range(len(jobs))), residents, jobs)
    hidden = backbone.forward(rows, stacks, attention)
    logits = backbone.logits(hidden[starts].detach()).requires_grad_()
    F.cross_entropy(logits, torch.tensor(jobs), reduction="sum").backward()
    assert logits.grad is not None
    slope = torch.zeros_like(hidden)
    slope[starts] = backbone.head.transposed_product(logits.grad.to(hidden.dtype))
    hidden.backward(slope)
    found = stacks.gradients()
    return [[g.clone() for g in stacks.gradient(i, found[i]) if g is not None] for i in range(len(jobs))]


def forward(backbone: Backbone, grafts: list[int | str], residents: list[Resident]) -> tuple[Tensor, Tensor]:
    """Hidden states of the images, each under one of the residents or bare, and the rows of their class tokens."""
    rows, attention, starts = packed(backbone, grafts, residents, tuple(range(len(PIXELS))))
    with torch.inference_mode():
        return backbone.forward(rows, backbone.stacks(residents), attention), starts


def packed(
    backbone: Backbone, grafts: list[int | str], residents: list[Resident], images: tuple[int, ...]
) -> tuple[Rows, WholeSequences, Tensor]:
    ids, given, spans, sequences, starts = [], [], [], [], []  # type: ignore[var-annotated]
    for graft, patches in zip(grafts, backbone.patches(PIXELS[list(images)]), strict=True):
        virtual = residents[graft].spec.virtual_length if isinstance(graft, int) else 0
        first = sum(map(len, ids))  # type: ignore[arg-type]
        ids.append(torch.tensor([*virtual_ids(virtual), *[0] * len(patches)]))
        given.append(F.pad(patches, (0, 0, virtual, 0)))
        sequences.append((first, len(ids[-1])))
        starts.append(first + virtual)
        if isinstance(graft, int):
            spans.append(Span(first, first + len(ids[-1]), graft))
    positions = torch.cat([torch.arange(len(own)) for own in ids])
    rows = Rows(torch.cat(ids), positions, tuple(spans), inputs_embeds=torch.cat(given))
    return rows, WholeSequences(tuple(sequences), backbone.shape), torch.tensor(starts)

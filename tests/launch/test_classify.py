"""`polygraft classify`: the labels that a folder's graft gives to texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.launch.main import app
from tests.grafts.oracle.row import random_tensors
from tests.tiny import TINY, tiny_llama

TEXTS = ["a sweet fruit", "sour", "What is a graft?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def saved(root: Path, folder: Path, head: Head | None) -> Path:
    bound = BoundGraft(replace(parse("lora(r=2, at=attn.q)"), head=head), TINY)
    values = {name: value.float() for name, value in random_tensors(bound, 0).items()}
    return root / native.save(root, bound, values, backbone=fingerprint(folder), backbone_files=BackboneFiles(folder))


@pytest.mark.parametrize("from_file", [False, True])
def test_it_says_what_transformers_model_says(from_file: bool, folder: Path, tmp_path: Path) -> None:
    graft = saved(tmp_path, folder, Head(("bad", "fair", "good")))
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    given = ["--file", str(tmp_path / "texts.txt")] if from_file else TEXTS
    asked = ["--home", str(tmp_path / "home"), "classify", str(graft), "--backbone", str(folder), "--json", *given]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(plain, str(graft)).eval(), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    for text, one in zip(TEXTS, told, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert one["text"] == text and list(one["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert one["label"] == ("bad", "fair", "good")[expected.index(max(expected))]


def test_a_graft_without_a_classifier_and_no_texts_are_said(folder: Path, tmp_path: Path) -> None:
    graft = saved(tmp_path, folder, None)
    asked = ["--home", str(tmp_path / "home"), "classify", str(graft), "--backbone", str(folder)]
    assert "has no classifier" in CliRunner().invoke(app, [*asked, "a text"]).output
    assert "give texts, or --file" in CliRunner().invoke(app, asked).output

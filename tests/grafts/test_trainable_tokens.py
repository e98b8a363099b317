"""Edited embeddings are PEFT's where the head is not tied to them; prompts start from the tokens they are told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import TrainableTokensConfig
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.plain import Place
from tests.grafts.oracle.row import Row, relative
from tests.grafts.test_methods import batch, judged, ours
from tests.tiny import tiny_llama

EDITED = [338, 37, 176]


def _place(model: object, name: str, value: Tensor) -> Place:
    found = model.get_submodule("base_model.model.model.embed_tokens")  # type: ignore[attr-defined]
    return Place(found.trainable_tokens_delta["default"])


def test_edited_rows_are_pefts_trainable_tokens(tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_llama(tmp_path, tied=False), torch.float64)
    row = Row(
        f"trainable-tokens({'|'.join(map(str, EDITED))})",
        lambda: TrainableTokensConfig(token_indices=EDITED, target_modules=["embed_tokens"]),
        place=_place,
    )
    prompts, slopes = batch(backbone)
    values = row.values(backbone.shape, seed=1)
    expected, wanted = judged(row.oracle(backbone.folder, values, backbone.dtype), prompts, slopes)
    found, gradients = ours([(row, values)], backbone, prompts, slopes)
    assert relative(found, expected) < 1e-9
    assert relative(gradients["0.0.embed.p"], wanted["0.0.embed.p"]) < 1e-9


def test_rows_start_as_the_embeddings_of_tokens(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    table, samples = backbone.embedding, ((5, 6, 7), (9,))

    def start(text: str, seed: int = 0) -> Tensor:
        graft = BoundGraft(parse(text), backbone.shape)
        return initialise(graft, backbone, seed=seed, samples=samples)["0.0.embed.p"]

    assert torch.equal(start("prompt(5)"), table[[5, 6, 7, 5, 6]])
    assert torch.equal(start("trainable-tokens(9|300)"), table[[9, 300]])
    drawn = start("prompt(5, start=vocabulary)")
    assert all((table == row).all(1).any() for row in drawn) and not torch.equal(drawn, start("prompt(5)"))
    assert torch.equal(drawn, start("prompt(5, start=vocabulary)"))
    assert not torch.equal(drawn, start("prompt(5, start=vocabulary)", seed=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainable-tokens(3|3)", "different tokens"),
        ("trainable-tokens(a)", "numbers of tokens"),
        ("trainable-tokens(512)", "not a token of this backbone"),
        ("prompt(3) + prompt(2)", "two prompts of one kind"),
        ("prompt(3, start=zero)", "choices: text, vocabulary, normal"),
        ("p-tuning(3, encoder=gru)", "choices: mlp, lstm"),
        ("prompt(3)@1", "embed is in layer 0"),
        ("prompt(0)", "give at least 1"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str, tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    with pytest.raises(SpecError, match=message):
        BoundGraft(parse(text), backbone.shape)

"""Where a stream may end: `ignore_eos` and `min_tokens`, against transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from polygraft.grafts.runtime.backbone import Backbone
from tests.serving.engines import Heard, engine_on, request, run
from tests.tiny import tiny_llama

PROMPT = (5, 17, 101, 40, 7)
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32)


def generated(folder: Path, **config: object) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, pad_token_id=0, **config)
    with torch.no_grad():
        said: list[int] = model.generate(torch.tensor([PROMPT]), generation_config=found)[0, len(PROMPT) :].tolist()
    return said


def said_by(backbone: Backbone, data: Path, **fields: object) -> tuple[list[int], str | None]:
    heard = Heard({"a": list(fields.get("generated", ()))})  # type: ignore[call-overload]
    engine = engine_on(backbone, data, heard=heard)
    engine.submit(request("a", PROMPT, LENGTH, **fields))
    run(engine)
    return heard.tokens["a"], heard.reasons()["a"]


def test_an_end_that_is_to_be_ignored_is_a_token_like_any_other(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    plain = generated(folder, eos_token_id=None)
    end = (plain[3],)
    assert said_by(backbone, tmp_path / "a", eos_ids=end) == (plain[: plain.index(end[0]) + 1], "stop")
    assert said_by(backbone, tmp_path / "b", eos_ids=end, ignore_eos=True) == (plain, "length")


@pytest.mark.parametrize("least", [1, 4, 9])
def test_no_end_comes_before_the_fewest_tokens_and_the_next_one_may(
    backbone: Backbone, folder: Path, tmp_path: Path, least: int
) -> None:
    plain = generated(folder, eos_token_id=None)
    ends = (plain[0], plain[2])
    expected = generated(folder, eos_token_id=list(ends), min_new_tokens=least)
    tokens, reason = said_by(backbone, tmp_path, eos_ids=ends, min_tokens=least)
    assert tokens == expected and not set(tokens[:least]) & set(ends)
    assert reason == ("stop" if expected[-1] in ends else "length")


def test_ends_that_are_ignored_are_barred_from_the_first_tokens_too(backbone: Backbone, tmp_path: Path) -> None:
    """As in vLLM, whose min_tokens knows nothing of ignore_eos."""
    first, _ = said_by(backbone, tmp_path / "a")
    tokens, reason = said_by(backbone, tmp_path / "b", eos_ids=(first[0],), min_tokens=2, ignore_eos=True)
    assert first[0] not in tokens[:2] and len(tokens) == LENGTH and reason == "length"


def test_a_stream_taken_over_counts_the_tokens_that_it_has(backbone: Backbone, tmp_path: Path) -> None:
    drawn = {"temperature": 1.2, "top_k": 9, "min_p": 0.01, "seed": 3, "eos_ids": tuple(range(40)), "min_tokens": 12}
    whole, _ = said_by(backbone, tmp_path / "a", **drawn)
    rest, _ = said_by(backbone, tmp_path / "b", **drawn, generated=tuple(whole[:5]), attempt=1)
    assert not set(whole[:12]) & set(range(40)) and len(whole) > 12
    assert rest == whole

"""A prompt and a training sample of 4,096 tokens, on sizes that follow from a small device, beside transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.settings import Settings, load
from polygraft.cluster.sizing import fitted, sizes
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pretrained import materialise
from polygraft.launch.cache import backbone_cache
from polygraft.serving.engine import Engine
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner
from tests.cluster.builders import make_backbone, make_device
from tests.serving.engines import Heard, request, run
from tests.tiny import tiny_llama

LONG = 4096
GIB = 1 << 30


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.nightly)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with 8,192 positions."""
    if request.param == "smollm2":
        return materialise("smollm2", backbone_cache())
    made = tiny_llama(tmp_path_factory.mktemp("tiny"), heads=2, kv_heads=1)
    config = made / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2 * LONG}))
    return made


@pytest.fixture(scope="module")
def settings(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a machine with one device of 8 GiB."""
    told = load(home=tmp_path_factory.mktemp("home"), dtype="fp32")
    backbone = make_backbone("b", folder=str(folder), dtype="fp32")
    return fitted(told, replace(backbone, sizes=sizes(told, backbone, [make_device(bytes_=8 * GIB)])))


def tokens(backbone: Backbone, count: int) -> tuple[int, ...]:
    drawn = torch.randint(0, backbone.shape.vocab, (count,), generator=torch.Generator().manual_seed(0))
    return tuple(drawn.tolist())


def test_a_prompt_of_4096_tokens_is_answered_as_transformers_answers_it(
    folder: Path, settings: Settings, tmp_path: Path
) -> None:
    heard, backbone = Heard(), Backbone.load(folder, torch.float32)
    prompt = tokens(backbone, LONG)
    engine = Engine(backbone, settings.serve, replica=ReplicaId("r0"), data=tmp_path)
    engine.listen("", heard)
    assert settings.serve.max_context == 2 * LONG
    engine.submit(request("long", prompt, 6))
    run(engine)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = reference.generate(  # type: ignore[misc]
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    assert heard.tokens["long"] == expected[0, LONG:].tolist()


@pytest.mark.parametrize("folder", ["tiny"], indirect=True)  # SmolLM2's takes 14 GB in float32, by estimate
def test_a_sample_of_4096_tokens_trains_from_the_loss_that_transformers_has(folder: Path, settings: Settings) -> None:
    backbone = Backbone.load(folder, torch.float32, training=True)
    ids = tokens(backbone, LONG)
    job = TrainJob(
        id="long",
        graft=BoundGraft(parse("lora(r=2)"), backbone.shape),
        config=TrainConfig(epochs=2, batch_size=1, learning_rate=1e-2, micro_rows=settings.pack.micro_rows),
        train=(Sample(ids, (1.0,) * LONG),),
    )
    pack = PackRunner(backbone, max_rows=settings.pack.max_rows, max_bytes=settings.pack.memory_bytes)
    pack.admit(pack.memory.fitted(job))
    losses = [stepped.loss for _ in range(2) for stepped in pack.step().stepped]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        labels = torch.tensor([ids])
        expected = float(reference(input_ids=labels, labels=labels).loss)
    assert losses[0] == pytest.approx(expected, rel=1e-5) and losses[1] < losses[0]

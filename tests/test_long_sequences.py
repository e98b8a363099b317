"""A prompt and a training sample of 4,096 tokens, on sizes that follow from a small device, beside transformers; by
night SmolLM2's, too, as it is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.cluster.model import Dtype, ReplicaId
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
COUNT = 6  # tokens of an answer
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
    return sized(folder, tmp_path_factory.mktemp("home"), "fp32", 8)


def sized(folder: Path, home: Path, dtype: Dtype, gib: int) -> Settings:
    """Of a machine with one device of so many GiB."""
    told = load(home=home, dtype=dtype)
    backbone = make_backbone("b", folder=str(folder), dtype=dtype)
    return fitted(told, replace(backbone, sizes=sizes(told, backbone, [make_device(bytes_=gib * GIB)])))


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


@pytest.mark.nightly
@pytest.mark.parametrize("folder", ["smollm2"], indirect=True)
def test_a_prompt_of_4096_tokens_in_bf16_gets_tokens_that_are_likeliest_within_its_rounding(
    folder: Path, tmp_path: Path
) -> None:
    """Each is as likely, by transformers in float32, as the likeliest one but for what rounding does to transformers'
    own logits in bf16, 1.5 times of it on either side."""
    heard, backbone = Heard(), Backbone.load(folder, torch.bfloat16)
    prompt, settings = tokens(backbone, LONG), sized(folder, tmp_path / "home", "bf16", 8)
    engine = Engine(backbone, settings.serve, replica=ReplicaId("r0"), data=tmp_path)
    engine.listen("", heard)
    engine.submit(request("long", prompt, COUNT, eos_ids=()))
    run(engine)
    said = heard.tokens["long"]
    wide, narrow = (logits_after(folder, dtype, prompt, said) for dtype in (torch.float32, torch.bfloat16))
    error = 1.5 * (wide - narrow).abs().amax(1)
    assert len(said) == COUNT
    assert bool((wide.amax(1) - wide[range(COUNT), said] <= 2 * error).all())


def logits_after(folder: Path, dtype: torch.dtype, prompt: tuple[int, ...], said: list[int]) -> torch.Tensor:
    """Of transformers, for each of the tokens that follow the prompt [tokens, vocabulary], in float32."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        found: torch.Tensor = reference(torch.tensor([[*prompt, *said[:-1]]]), logits_to_keep=len(said)).logits[0]
    return found.float()


@pytest.mark.parametrize("folder", ["tiny"], indirect=True)  # SmolLM2's takes 14 GB in float32, by estimate
def test_a_sample_of_4096_tokens_trains_from_the_loss_that_transformers_has(folder: Path, settings: Settings) -> None:
    losses = trained(folder, torch.float32, settings)
    assert losses[0] == pytest.approx(transformers_loss(folder, torch.float32), rel=1e-5) and losses[1] < losses[0]


@pytest.mark.nightly
@pytest.mark.parametrize("folder", ["smollm2"], indirect=True)
def test_a_sample_of_4096_tokens_trains_in_bf16_on_half_of_a_larger_device(folder: Path, tmp_path: Path) -> None:
    """From the loss of float32, as far from it as transformers in bf16 is, 1.5 times, or by bf16's own step."""
    losses = trained(folder, torch.bfloat16, sized(folder, tmp_path, "bf16", 24))
    wide, narrow = (transformers_loss(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert abs(losses[0] - wide) <= max(1.5 * abs(narrow - wide), 2.0**-8 * wide) and losses[1] < losses[0]


def trained(folder: Path, dtype: torch.dtype, settings: Settings) -> list[float]:
    """The losses of two steps over one sample."""
    backbone = Backbone.load(folder, dtype, training=True)
    ids = tokens(backbone, LONG)
    job = TrainJob(
        id="long",
        graft=BoundGraft(parse("lora(r=2)"), backbone.shape),
        config=TrainConfig(epochs=2, batch_size=1, learning_rate=1e-2, micro_rows=settings.pack.micro_rows),
        train=(Sample(ids, (1.0,) * LONG),),
    )
    pack = PackRunner(backbone, max_rows=settings.pack.max_rows, max_bytes=settings.pack.memory_bytes)
    pack.admit(pack.memory.fitted(job))
    return [stepped.loss for _ in range(2) for stepped in pack.step().stepped]


def transformers_loss(folder: Path, dtype: torch.dtype) -> float:
    """Of the same sample."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    drawn = torch.randint(0, reference.config.vocab_size, (LONG,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float(reference(input_ids=drawn[None], labels=drawn[None]).loss)

"""What the parts of the GPU run work on: random models of real shapes, grafts on them, jobs and prompts. Nothing is
read from a network, and nothing but the grafts' and the models' own files from the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_card import Card
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polygraft.cluster.model import GraftId, ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import ModelShape
from polygraft.serving.engine import Engine
from polygraft.serving.messages import Load, StepTokens
from polygraft.serving.request import GenerationRequest
from polygraft.trainers.job import Sample, TrainConfig, TrainJob

LORA = "lora(r=16, alpha=32, at=linear)"
GRAFTS = 8
_WORDS = 500  # ids that text is drawn from
# hidden, layers, heads, key heads, ffn, vocabulary, standard deviation of the weights
SHAPES: Mapping[str, tuple[int, int, int, int, int, int, float]] = {
    "tiny": (64, 2, 4, 2, 96, 512, 0.1),
    "smollm2-135m": (576, 30, 9, 3, 1536, 49152, 0.04),
    "llama-1b": (2048, 16, 32, 8, 8192, 32768, 0.02),
}


def model_files(root: Path, shape: str, card: Card) -> Path:
    """The folder of a random Llama in bf16 (the tiny one in float32), made where it is fast, and once if no other part
    makes it just now."""
    folder, draft = root / shape, root / f".{shape}.{os.getpid()}"
    if folder.exists():
        return folder
    hidden, layers, heads, kv_heads, ffn, vocab, spread = SHAPES[shape]
    dtype = "float32" if shape == "tiny" else "bfloat16"
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(card.device if card.real else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(draft)
    with suppress(OSError):  # another part was first, with the same files
        draft.rename(folder)
    return folder


def values_of(text: str, backbone: Backbone, seed: int) -> Mapping[str, Tensor]:
    """Starting values with noise on what is trained, on the CPU, so that the graft changes what is computed."""
    graft = BoundGraft(parse(text), backbone.shape)
    start = initialise(graft, backbone, seed=seed, samples=_samples(seed, 2, 12), weights=())
    generator = torch.Generator().manual_seed(seed)
    trained = {tensor.name for tensor in graft.trained}
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if name in trained else value
        for name, value in start.items()
    }


def saved_grafts(data: Path, backbone: Backbone, texts: Sequence[str]) -> tuple[str, ...]:
    """Native folders under `data/grafts`, PEFT's files beside them where PEFT has the method; their names."""
    return tuple(
        native.save(
            data / "grafts",
            BoundGraft(parse(text), backbone.shape),
            values_of(text, backbone, seed),
            backbone=backbone.fingerprint,
        )
        for seed, text in enumerate(texts)
    )


def jobs(
    texts: Mapping[str, str], shape: ModelShape, *, length: int, samples: int, epochs: int, first: int = 0
) -> list[TrainJob]:
    """A job of each text, of samples of `length` tokens that all predict the next one; `first` is the first's seed."""
    made = []
    for seed, (name, text) in enumerate(texts.items(), first):
        config = TrainConfig(epochs=epochs, batch_size=1, learning_rate=1e-3, schedule="constant", seed=seed)
        made.append(TrainJob(name, BoundGraft(parse(text), shape), config, samples_of(seed, samples, length)))
    return made


def samples_of(seed: int, count: int, length: int) -> tuple[Sample, ...]:
    """Of `length` tokens that all predict the next one."""
    return tuple(Sample(ids, (0.0,) + (1.0,) * length) for ids in _samples(seed, count, length + 1))


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return _samples(1000 + seed, 1, length)[0]


def _samples(seed: int, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, _WORDS, (count, length), generator=generator)
    return tuple(tuple(ids) for ids in drawn.tolist())


@dataclass
class Turned:
    """An engine that is turned by hand, its grafts in memory from the start."""

    engine: Engine
    tokens: dict[str, list[int]]
    errors: dict[str, str]

    @staticmethod
    def of(backbone: Backbone, data: Path, grafts: Sequence[str], streams: int = 128) -> Turned:
        settings = ServeSettings(
            max_streams=streams, max_queued=streams, max_rows=4096, kv_bytes=1 << 30, prefix_cache=False
        )
        engine = Engine(backbone, settings, replica=ReplicaId("gpu"), data=data, graft_bytes=8 << 30)
        residency = engine._streams.residency
        for graft in map(GraftId, grafts):
            residency.admit(residency.fetch(graft), [GraftId(one) for one in grafts])
        turned = Turned(engine, {}, {})
        engine.listen("", turned._hear)
        return turned

    def submit(self, id: str, graft: str | None, prompt: tuple[int, ...], count: int, **said: Any) -> None:
        self.tokens[id] = []
        said = {"temperature": 0.0, "graft": None if graft is None else GraftId(graft), **said}
        request = GenerationRequest(id=id, tenant=TenantId("t"), prompt_ids=prompt, max_tokens=count, **said)
        assert self.engine.submit(request) is None, "the engine's queue is full"

    def run(self) -> None:
        """Until every stream is over; RuntimeError when one is not."""
        while self.engine.turn() or self.engine.load.waiting or self.engine.load.running:
            if self.errors:
                break
        if self.errors:
            raise RuntimeError(str(self.errors)[:500])

    def _hear(self, step: tuple[StepTokens, ...], _: Load) -> None:
        for said in step:
            if said.finish_reason == "error":
                self.errors[said.request] = str(said.error)
            if said.token is not None:
                self.tokens[said.request].append(said.token)


def relative(found: Tensor, wanted: Tensor) -> float:
    """rel-L2; what is not finite is infinitely far."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return error if error == error else float("inf")

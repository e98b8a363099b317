"""Whether the serving arms say the same: the engine's greedy tokens in mixed batches against PEFT with one graft at a
time.

Every token is judged where it stands: PEFT reads the engine's own stream, and at each token asks how far below its own
favourite the engine's choice lies. Sequences compared by eye would part for good at the first near tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from child import Reply, answer, task
from material import GRAFTS, Material
from peft import PeftModel
from peft_models import adapt, load, name
from record import Check, Gate
from serving_engine import Burst
from torch import Tensor

from polygraft.grafts.runtime.backbone import Backbone, best_dtype

EXACT = 1e-3  # float32: how far below PEFT's favourite a token may lie, in logits
AS_GOOD = 1.5  # bf16: the same, as a multiple of PEFT's own worst error in the distance of its two favourites
AS_OFTEN = 0.05  # bf16: how many fewer tokens may be float32's favourites than of PEFT's own in bf16

Streams = Sequence[Sequence[int]]


def check(folder: str, count: int) -> Gate:
    """Float32 first, then the dtype that is timed; `count` tokens of every stream."""
    material = Material.read(folder)
    exact = adapt(load(material, "float32"), material, range(GRAFTS))
    said = _ours(material, torch.float32, count)
    true = _logits(exact, material, said)
    foreign = _below(_logits(exact, material, said, shift=1), said)
    checks = [
        Check("float32: logits below PEFT's favourite", float(_below(true, said).max()), EXACT),
        Check("another graft finds fault with every stream", float(foreign.amax(1).min()), 100 * EXACT, least=True),
    ]
    if best_dtype() != torch.float32:
        timed = str(best_dtype()).removeprefix("torch.")
        said = _ours(material, best_dtype(), count)
        true = _logits(exact, material, said)
        coarse = _logits(adapt(load(material, timed), material, range(GRAFTS)), material, said)
        favourites = true.topk(2).indices
        error = (coarse - true).gather(2, favourites).diff().abs().max()
        below = _below(true, said)
        share, limit = _share(below == 0), _share(coarse.argmax(2) == favourites[:, :, 0]) - AS_OFTEN
        checks += [
            Check(f"{timed}: logits below PEFT's favourite in float32", float(below.max()), AS_GOOD * float(error)),
            Check(f"{timed}: share of tokens that are PEFT's favourites in float32", share, limit, least=True),
        ]
    return Gate(tuple(checks))


def _ours(material: Material, dtype: torch.dtype, count: int) -> Streams:
    burst = Burst(Backbone.load(Path(material.backbone), dtype), material)
    try:
        return burst.run(count, grafts=True)
    finally:
        burst.close()


@torch.inference_mode()
def _logits(model: PeftModel, material: Material, said: Streams, *, shift: int = 0) -> Tensor:
    """[streams, tokens, vocab] float32: what each token of every stream was chosen from, its graft alone on the model.

    With `shift` streams are read by the graft that is so many further on.
    """
    found = []
    for prompt, tokens, stream in zip(material.prompts, said, range(len(said)), strict=True):
        model.set_adapter(name((stream + shift) % GRAFTS))
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        found.append(model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float())
    return torch.stack(found)


def _below(logits: Tensor, said: Streams) -> Tensor:
    """[streams, tokens]: how far each token lies below the favourite."""
    chosen = logits.gather(2, torch.tensor(said).unsqueeze(2)).squeeze(2)
    return logits.amax(2) - chosen


def _share(right: Tensor) -> float:
    return float(right.float().mean())


if __name__ == "__main__":

    def _check() -> Reply:
        return asdict(check(task().folder, task().size))

    torch.set_num_threads(task().threads)
    answer({"check": _check})

"""One side of `bf16_error.py`: how far a tree's bf16 is from float32.

python benchmarks/bf16_error_tree.py TREE FOLDER OUT

Run with the tree's folders as `polygraft`; gradients are those of the tree's own training gate.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bf16_error import EVERY, PROMPT, TRUTH, errors, joined, texts
from material import GRAFT, GRAFTS, Material
from parity_names import Backbone, Engine, GenerationRequest, ServeSettings, attribute, named, resident_of, tests_of
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar


def main(tree: Path, folder: Path, out: Path) -> None:
    found_in = Path(sys.modules[Backbone.__module__].__file__ or "").resolve()
    assert found_in.is_relative_to(tree.resolve()), f"polygraft is {found_in}, which is not of {tree}"
    tests_of(tree)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    sys.path.insert(0, str(tree / "benchmarks"))
    material = Material.read(str(folder))
    backbone = Backbone.load(Path(material.backbone), torch.bfloat16)
    found = whole(backbone, material) | decoded(backbone, material) | gradients(material)
    out.write_text(json.dumps(errors(found, load_file(folder / TRUTH))))


@torch.inference_mode()
def whole(backbone: Any, material: Material) -> dict[str, Tensor]:
    """Logits of every text alone, bare and with the first graft, and of one of every job in a batch, with its graft."""
    load = named("grafts.formats.native:load")
    residents = []
    for number, graft in enumerate(material.grafts):
        stored = load(material.graft_folder(number), shape=backbone.shape, backbone=backbone.fingerprint)
        residents.append(resident_of(graft, GRAFT, backbone, stored.tensors))
    prompts = [torch.tensor(text) for text in texts(material)]
    found: dict[str, Tensor] = {}
    for number, prompt in enumerate(prompts):
        (found[f"bare/{number}"],) = _logits(backbone, [None], [prompt])
        (found[f"LoRA/{number}"],) = _logits(backbone, residents[:1], [prompt])
    for first in range(0, len(prompts), GRAFTS):
        for number, logits in enumerate(_logits(backbone, residents, prompts[first : first + GRAFTS]), first):
            found[f"mixed/{number}"] = logits
    return found


def _logits(backbone: Any, residents: Sequence[Any], prompts: Sequence[Tensor]) -> list[Tensor]:
    """Of prompts in one batch, each with the resident at its place."""
    grafts = [(None, None) if one is None else (place, one.spec) for place, one in enumerate(residents)]
    rows, attention, answers = named("tests.grafts.packing:packed")(backbone, grafts, [[one] for one in prompts])
    stacks = backbone.stacks([one for one in residents if one is not None])
    hidden = backbone.forward(rows, stacks, attention)
    return [backbone.logits(hidden[places[EVERY - 1 :: EVERY]]) for places in answers]


def decoded(backbone: Any, material: Material) -> dict[str, Tensor]:
    """Logits of all texts in one engine, each with its job's graft, from the prompt's last token on: what is sampled is
    the text's next token."""
    engine = Engine(backbone, ServeSettings(), replica="replica", data=Path(material.folder))
    engine.listen("", lambda *_: None)
    told, rows = texts(material), [list[Tensor]() for _ in texts(material)]

    def next_tokens(logits: Tensor, draws: Sequence[Any]) -> list[int]:
        for row, draw in zip(logits, draws, strict=True):
            if draw.index % EVERY == 0:
                rows[draw.seed].append(row.clone())
        return [(told[draw.seed] + [0])[PROMPT + draw.index] for draw in draws]

    with patch.object(named("serving.engine"), "sample", next_tokens):
        for number, text in enumerate(told):
            said = {"prompt_ids": tuple(text[:PROMPT]), "max_tokens": len(text) - PROMPT + 1, "seed": number}
            graft = material.grafts[number % GRAFTS]
            engine.submit(GenerationRequest(id=str(number), tenant="t", graft=graft, temperature=0.0, **said))
        while (busy := engine.turn()) or engine.load.waiting or engine.load.running:
            if not busy:
                time.sleep(0.002)  # a graft is read in another thread
    engine.stop()
    return {f"decoded/{number}": torch.stack(own) for number, own in enumerate(rows)}


def gradients(material: Material) -> dict[str, Tensor]:
    """Of every job's first step."""
    by_pack = attribute(import_module("training_gate"), "by_pack", "_ours")
    return {f"gradient/{job}": joined(by_pack(material, torch.bfloat16, (job,))[1]) for job in range(GRAFTS)}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""What `bf16_error.py` compares with: grafts and texts, what transformers and PEFT make of them in float32, and how far
from that they are in bf16.

python benchmarks/bf16_error_oracle.py TREE FOLDER OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bf16_error import EVERY, PROMPT, TRUTH, errors, joined, texts
from material import GRAFTS, Material, make
from peft_models import adapt, load, name
from safetensors.torch import save_file
from torch import Tensor
from training_gate import by_peft
from transformers.utils.logging import disable_progress_bar


def main(folder: Path, out: Path) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    make(folder)
    material = Material.read(str(folder))
    true = logits(material, "float32") | gradients(material, "float32")
    save_file(true, folder / TRUTH)
    out.write_text(json.dumps(errors(logits(material, "bfloat16") | gradients(material, "bfloat16"), true)))


@torch.inference_mode()
def logits(material: Material, variant: str) -> dict[str, Tensor]:
    """Of every text: bare, with the first graft, with its job's, and the last once more of what is decoded."""
    model = adapt(load(material, variant), material, range(GRAFTS))

    def told(text: Sequence[int]) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits
        return logits[0, EVERY - 1 :: EVERY].float().contiguous()

    found: dict[str, Tensor] = {}
    for number, text in enumerate(texts(material)):
        with model.disable_adapter():
            found[f"bare/{number}"] = told(text)
        for cell, graft in {"LoRA": 0, "mixed": number % GRAFTS}.items():
            model.set_adapter(name(graft))
            found[f"{cell}/{number}"] = told(text)
        found[f"decoded/{number}"] = found[f"mixed/{number}"][PROMPT // EVERY - 1 :].clone()
    return found


def gradients(material: Material, variant: str) -> dict[str, Tensor]:
    """Of every job's first step."""
    return {f"gradient/{job}": joined(by_peft(material, variant, (job,))[1]) for job in range(GRAFTS)}


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[3]))

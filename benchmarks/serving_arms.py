"""The arms of the serving benchmark, each in a process of its own. A round is one burst of streams."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from child import Round, Worker, task, timed, work
from limits import Ceiling
from material import GRAFTS, PROMPTS, Material
from peft_models import adapt, load, name
from servers import Task
from serving_engine import Burst
from torch import Tensor
from transformers import GenerationConfig

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import in_own_thread

_WARM_TOKENS = 4


class Ours:
    """The engine with its own thread, every stream on its graft or all on the bare backbone."""

    def __init__(self, given: Task, *, grafts: bool) -> None:
        self._task, self._material, self._grafts = given, Material.read(given.folder), grafts

    def load(self) -> str:
        self._backbone, self._burst = in_own_thread(self._made)
        self._burst.run(1, grafts=False)
        return str(self._backbone.dtype).removeprefix("torch.")

    def _made(self) -> tuple[Backbone, Burst]:
        backbone = Backbone.load(Path(self._material.backbone))
        return backbone, Burst(backbone, self._material)

    def warm(self) -> None:
        self._burst.run(_WARM_TOKENS, grafts=self._grafts)

    def round(self) -> Round:
        return timed(lambda: sum(map(len, self._burst.run(self._task.size, grafts=self._grafts))))


class Generate:
    """transformers' generate over all streams as one batch, through PEFT's `adapter_names` or on the bare backbone."""

    def __init__(self, given: Task, *, grafts: bool) -> None:
        self._task, self._material, self._grafts = given, Material.read(given.folder), grafts

    def load(self) -> str:
        self._base = load(self._material, self._task.variant)
        return self._task.variant

    def warm(self) -> None:
        self._generate: Callable[..., Tensor] = self._base.generate  # type: ignore[misc,assignment]
        if self._grafts:
            names = [name(stream % GRAFTS) for stream in range(PROMPTS)]
            self._generate = partial(adapt(self._base, self._material, range(GRAFTS)).generate, adapter_names=names)
        self._run(_WARM_TOKENS)

    def round(self) -> Round:
        return timed(lambda: self._run(self._task.size))

    @torch.inference_mode()
    def _run(self, count: int) -> int:
        prompts = torch.tensor(self._material.prompts)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, min_new_tokens=count, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        )
        said = self._generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        assert said.shape == (PROMPTS, prompts.shape[1] + count)
        return PROMPTS * count


def arm(given: Task) -> Worker:
    match given.kind:
        case "engine" | "engine_bare":
            return Ours(given, grafts=given.kind == "engine")
        case "generate" | "generate_bare":
            return Generate(given, grafts=given.kind == "generate")
        case "ceiling":
            return Ceiling(Material.read(given.folder), rows=PROMPTS, passes=given.size, backward=False)
        case other:
            raise ValueError(f"no arm {other!r}")


if __name__ == "__main__":
    torch.set_num_threads(task().threads)
    work(arm(task()))

"""What a user would pick in place of the engine: transformers' generate, with PEFT's mixed batches. Apart from our own
arm, which is not to carry PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from assignment import Task
from child import Round, timed
from material import GRAFTS, PROMPTS, Material
from peft_models import adapt, load, name
from torch import Tensor
from transformers import GenerationConfig

_WARM_TOKENS = 4


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

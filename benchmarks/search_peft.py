"""A LoRA trial as a user of PEFT trains it; a module of its own, which Tune's processes import."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import kernels_elsewhere  # noqa: F401
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import tune
from search_work import ALPHA, LoraTrial, Work
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM


class Lora:
    """One backbone in this process, and a trial's adapter on it at a time."""

    def __init__(self, work: Work, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._work = work
        self._base = AutoModelForCausalLM.from_pretrained(work.backbone, dtype=getattr(torch, dtype))
        self._model: nn.Module = self._base

    def save_start(self, trial: LoraTrial, folder: Path) -> None:
        """What `train` begins with, as PEFT's folder."""
        model = self._with_adapter(trial)
        model.save_pretrained(str(folder))
        self._base = model.unload()

    def train(
        self, trial: LoraTrial, stops: Sequence[int], steps: int, order: Sequence[Sequence[int]] | None = None
    ) -> Generator[tuple[int, float], None, None]:
        """(step, mean training loss since the stop before) at every stop; the schedule is that of so many steps, the
        samples those of the work's `order` where none is given."""
        order, model = order or self._work.order, self._with_adapter(trial)
        self._model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=trial.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        try:
            for before, stop in pairwise((0, *stops)):
                losses = []
                for step in range(before, stop):
                    loss = self._loss([self._work.train[number] for number in order[step]])
                    torch.autograd.backward(loss)
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
                    losses.append(loss.item())
                yield stop, fmean(losses)
        finally:
            self._base = model.unload()

    def _with_adapter(self, trial: LoraTrial) -> PeftModel:
        torch.manual_seed(trial.number)
        config = LoraConfig(r=trial.rank, lora_alpha=ALPHA, target_modules=list(trial.modules), task_type="CAUSAL_LM")
        return get_peft_model(self._base, config)

    @torch.inference_mode()
    def held_out(self) -> float:
        """Mean loss of a weighted token."""
        return float(self._loss(self._work.held_out))

    def _loss(self, samples: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Tensor:
        ids = torch.tensor([ids for ids, _ in samples])
        weights = torch.tensor([weights for _, weights in samples])[:, 1:].flatten()
        logits = self._model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum()

    def bare(self) -> float:
        """Before any training."""
        self._model = self._base
        return self.held_out()


class PeftTrial(tune.Trainable):
    """A trial for Tune: a step goes on to the next rung."""

    def setup(self, config: dict[str, object], folder: str, variant: str, steps: int) -> None:  # type: ignore[override]
        dtype, _, at_once = variant.partition(" ")
        self._work, self._steps = Work.read(folder), steps
        self._lora = Lora(self._work, dtype, max(1, (os.cpu_count() or 1) // int(at_once)))
        self._begin(config)

    def reset_config(self, new_config: dict[str, object]) -> bool:
        self._stages.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, object]:
        step, loss = next(self._stages)
        if step < self._steps:
            return {"step": step, "train_loss": loss, "done": False}
        held_out = self._lora.held_out()
        self._stages.close()
        return {"step": step, "train_loss": loss, "done": True, "loss": held_out}

    def cleanup(self) -> None:
        self._stages.close()

    def _begin(self, config: dict[str, object]) -> None:
        trial = self._work.trials[int(str(config["number"]))]
        self._stages = self._lora.train(trial, self._work.stops(self._steps), self._steps)

"""One method in the table of oracles, and values to compare it at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import CROSS, ModelShape
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import KV, GraftSpec, SpecError
from polygraft.launch.demo.oracle.naive import Hook, naive
from polygraft.launch.demo.oracle.peft_oracle import peft_oracle
from polygraft.launch.demo.oracle.plain import MODULES, Oracle, Place, embedded, plain_llama, read_rows
from tests.grafts.random_tensors import random_tensors

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Values = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """A graft as users write it, and its oracle: a PEFT config, or the equation of each slot in the order they apply.

    `place` says where PEFT's model keeps a tensor of ours, for methods that `peft_oracle` does not know by itself;
    `fixed` replaces random values that mean something (indices, orthogonal factors). `tolerance` is wider than rounding
    in float64 where PEFT computes in float32 whatever the model's dtype. `soft` is the equation of a method that acts
    on the input embeddings: from token ids, their embeddings [n, D] and the tensors by name to the rows [p + n, D].
    `model` makes the oracle of a method that is neither a hook nor such a function.
    `members` are the grafts that a method over others is given, all of this text.
    `llama_only` says why PEFT's model is no oracle on another architecture; there the equations are, where they are
    given too.
    """

    text: str
    config: Callable[[], PeftConfig] | None = None
    hooks: Callable[[], Mapping[int, Hook]] = dict
    place: Callable[[PeftModel, str, Tensor], Place] | None = None
    fixed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda values: values
    tolerance: float = 1e-9
    soft: Callable[[Tensor, Tensor, Values], Tensor] | None = None
    llama_only: str | None = None
    model: Callable[[Path, Values, torch.dtype], Oracle] | None = None
    members: str = ""

    @property
    def spec(self) -> GraftSpec:
        return parse(self.text)

    def graft(self, shape: ModelShape) -> BoundGraft:
        return _bound(self.text, shape)

    def values(self, shape: ModelShape, seed: int) -> dict[str, Tensor]:
        return self.fixed(random_tensors(self.graft(shape), seed))

    def sources(self, shape: ModelShape) -> dict[str, Source]:
        """Trained grafts under the names that the row says."""
        named = enumerate(self.spec.sources)
        graft = BoundGraft(parse(self.members or "lora"), shape)
        return {name: Source(graft, random_tensors(graft, seed)) for seed, name in named}

    def unfit(self, shape: ModelShape) -> str | None:
        """Why the row says nothing on this architecture."""
        try:
            self.graft(shape)
        except SpecError as error:
            return str(error)
        if shape.encoder_layers and any(slot.op == "tokens" and slot.mode == "replace" for slot in self.spec.slots):
            return "the equation edits what one stack reads, and both have its tokens"
        if shape.images and any(slot.op == "branch" and slot.last and not slot.first for slot in self.spec.slots):
            return "of the last layer an image's head reads the first row alone"
        if self.config is None or self.hooks() or self.soft or self.model or self._plain_prefix:
            return None
        return self._not_pefts(shape)

    def _not_pefts(self, shape: ModelShape) -> str | None:
        if shape.arch != "llama" and self.llama_only is not None:
            return self.llama_only
        if self.config is not None and isinstance(self.config(), PromptLearningConfig) and not shape.causal:
            return "PEFT's virtual tokens need a decoder"
        return None

    @property
    def _plain_prefix(self) -> bool:
        """Whether the cache alone expresses the row (naive.py)."""
        return all(isinstance(slot, KV) and slot.form is None and not slot.aside for slot in self.spec.slots)

    def oracle(self, folder: Path, values: Values, dtype: torch.dtype) -> Oracle:
        shape = ModelShape.from_config(_config(folder))
        if self.config is not None and self._not_pefts(shape) is None:
            config = self.config()
            names = {site.name for _, site in self.graft(shape).sites} & set(CROSS)
            if crossing := {MODULES[name].rpartition(".")[2] for name in names}:
                config.target_modules |= crossing  # type: ignore[attr-defined]
            return peft_oracle(folder, config, values, dtype, self.place)
        if self.model is not None:
            found = self.model(folder, values, dtype)
        elif self.soft is not None:
            found = _soft(folder, self.soft, values, dtype)
        else:
            found = naive(folder, self.hooks(), values, dtype)
        frozen = {t.name for t in self.graft(shape).tensors if not t.trained}
        return Oracle(found.logits, {name: place for name, place in found.places.items() if name not in frozen})


@cache
def _bound(text: str, shape: ModelShape) -> BoundGraft:
    return BoundGraft(parse(text), shape)


def _soft(
    folder: Path, equation: Callable[[Tensor, Tensor, Values], Tensor], values: Values, dtype: torch.dtype
) -> Oracle:
    model = plain_llama(folder, dtype)
    leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}

    def logits(ids: Tensor) -> Tensor:
        own = embedded(model, ids)
        return read_rows(model, ids, equation(ids, own, leaves))

    return Oracle(logits, {name: Place(leaf) for name, leaf in leaves.items()})


def _config(folder: Path) -> Mapping[str, object]:
    read: Mapping[str, object] = json.loads((folder / "config.json").read_text())
    return read


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())

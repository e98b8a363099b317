"""A published folder as transformers and PEFT read it: what it says of texts, answers and choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

END = "<|im_end|>"  # the tiny models' own, which the assistant writes, too


@dataclass(frozen=True, slots=True)
class Read:
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast

    @staticmethod
    def of(backbone: Path, folder: Path, *, labels: int = 0) -> Read:
        """In float32; with a classifier over so many labels."""
        more = {"num_labels": labels} if labels else {}
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        plain = kind.from_pretrained(backbone, dtype=torch.float32, **more)
        return Read(
            PeftModel.from_pretrained(plain, str(folder)).eval(), PreTrainedTokenizerFast.from_pretrained(backbone)
        )

    @torch.inference_mode()
    def logits(self, text: str) -> torch.Tensor:
        """[labels] of one text."""
        found: torch.Tensor = self.model(**self.tokenizer(text, return_tensors="pt")).logits[0]
        return found

    @torch.inference_mode()
    def answered(self, prompt: str, answer: str) -> tuple[float, int]:
        """Log-likelihood of an answer in a chat and of its end, and of how many tokens it is."""
        asked = [{"role": "user", "content": prompt}]
        opening = str(self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        found = self.tokenizer(
            opening + answer + END, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
        )
        ids, starts = found["input_ids"], found["offset_mapping"][0, 1:, 0]
        rows = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        said = rows.gather(1, ids[0, 1:, None])[:, 0][starts >= len(opening)]
        return float(said.sum()), len(said)

    def loss(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Of a token of the answers."""
        found = [self.answered(*pair) for pair in pairs]
        return -sum(likelihood for likelihood, _ in found) / sum(count for _, count in found)

    def accuracy(self, questions: Sequence[tuple[str, Sequence[str], int]]) -> float:
        """The share of prompts whose right choice, by its number, is the likeliest."""
        right = 0
        for prompt, choices, answer in questions:
            found = [self.answered(prompt, choice)[0] for choice in choices]
            right += found.index(max(found)) == answer
        return right / len(questions)

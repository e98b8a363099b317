"""The table's backbone: a Llama of six layers of 64, which has learnt some English from what Python says about itself
and from the dialogues that are no task.

Small enough that hundreds of curves take minutes, and trained, so that a graft changes something that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import kernels_elsewhere  # noqa: F401
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from peft_table.tasks import ENDS, STARTS, dialogues, encoded

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 6, 64, 4, 2, 160, 512
STEPS, BATCH, WINDOW, RATE = 800, 16, 96, 3e-3
DIALOGUES = 4  # times that the dialogues stand in the text beside Python's topics once
_SEED = 0


def make(folder: Path) -> Path:
    """The folder with config, weights and tokenizer, written if they are not there. The same versions of Python and
    torch give the same files."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = _taught(tokenizer)
    model.save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _texts() -> Iterator[str]:
    for _, text in sorted(topics.items()):
        yield text
    for pair in dialogues():
        yield f"{pair.question}\n{pair.answer}"


def _tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[STARTS, ENDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    return bpe


def _taught(tokenizer: Tokenizer) -> LlamaForCausalLM:
    stream = [id for _, text in sorted(topics.items()) for id in tokenizer.encode(text).ids]
    stream += DIALOGUES * [id for pair in dialogues() for id in encoded(tokenizer, pair).ids]
    text = torch.tensor(stream)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(STARTS),
        eos_token_id=tokenizer.token_to_id(ENDS),
        dtype="float32",
    )
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(config)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    chance = torch.Generator().manual_seed(_SEED)
    for _ in range(STEPS):
        windows = _windows(text, torch.randint(len(text) - WINDOW, (BATCH,), generator=chance).tolist())
        model(input_ids=windows, labels=windows).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.train(False)
    return model


def _windows(text: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    return torch.stack([text[start : start + WINDOW] for start in starts])

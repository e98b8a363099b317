"""Random models small enough for a unit test, each with a real tokenizer: byte-level BPE trained on the text below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from polygraft.grafts.sites import ModelShape

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small model.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """
system user assistant. You are a small model. What is a graft? A graft is a shoot that a gardener sets into another
plant, the stock, so that the two grow together as one. The stock gives the roots; the graft gives the fruit. Many
grafts can live on one stock, each with fruit of its own, and none of them knows who else is fed by the same roots.
How do you make one? Cut the shoot aslant, cut the stock to match, join the two where the green layers meet, and bind
them with a strip of cloth. Keep the wind and the sun away for some weeks. When do you do it? In late winter, before
the buds open, while the shoot is asleep and the sap of the stock begins to rise. Why does it work? The cut cells of
both plants grow into each other and build new vessels, so that water and sugar can pass. Which plants can be joined?
Only those that are close relations: apple on apple, pear on quince, plum on sloe, cherry on bird cherry. What if it
fails? The shoot dries up, the stock puts out leaves of its own, and the gardener tries again in the next year.
Where was it done first? People wrote about it in China and in Greece more than two thousand years ago. Is the fruit
changed by the stock? Hardly: the stock decides how tall the tree grows and how early it bears, not how apples taste.
"""


# What `tiny_llama` makes by default.
TINY = ModelShape("llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512, positions=512)


def tiny_llama(  # noqa: PLR0913
    folder: Path,
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    vocab: int = 512,
    tied: bool = True,
) -> Path:
    """Save a random LlamaForCausalLM (fp32) and its tokenizer in `folder`; the same arguments give the same files."""
    tokenizer = tokenizer_of(vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Wider than a trained model's start, so that logits differ between tokens by far more than rounding.
        initializer_range=0.1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_COMMON = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512}
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}  # as tight as the tiny model's scores need
_T5 = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "relative_attention_max_distance": 20}
_GATED = {"d_kv": 24, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# What each architecture says beside the common numbers.
CONFIGS: Mapping[str, Mapping[str, object]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "head_dim": 32, "sliding_window": 6},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {**_GROUPED, "head_dim": 24},
    "gemma": {**_GROUPED, "head_dim": 32},
    "gemma2": {**_GROUPED, "head_dim": 32, "sliding_window": 5, **_CAPS},
    "gemma3_text": {**_GROUPED, "head_dim": 32, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi": {**_GROUPED, "qk_layernorm": True},
    "gpt2": {"n_positions": 512},
    "gpt_neox": {"intermediate_size": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 512},
    "bert": {"intermediate_size": 96},
    "roberta": {"intermediate_size": 96, "pad_token_id": 1},
    "t5": _T5,
    "t5.gated": {**_T5, **_GATED},
    "vit": {"intermediate_size": 96, "image_size": 20, "patch_size": 5, "num_channels": 3, "num_labels": 10},
}
HEADS = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "vit": AutoModelForImageClassification,
    "t5": AutoModelForSeq2SeqLM,
    "t5.gated": AutoModelForSeq2SeqLM,
}


def tiny_model(folder: Path, arch: str, seed: int = 0) -> Path:
    """Save a random model (fp32) of an architecture, none of its norms and biases at its starting value, and a
    tokenizer."""
    tokenizer = tokenizer_of()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    spread = {"init_std" if arch == "opt" else "initializer_range": 0.1}
    said = {**_COMMON, **special, **spread, **CONFIGS[arch], "dtype": "float32"}
    config = AutoConfig.for_model(arch.partition(".")[0], **said)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HEADS.get(arch, AutoModelForCausalLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(vocab: int = 512) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    assert bpe.get_vocab_size() == vocab
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )

"""The random backbones that parity is measured on, as folders. They are made here, and not by the tests of either tree,
so that both sides read the same files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

VOCAB = 512
_COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512}
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
_T5 = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "relative_attention_max_distance": 20}
_GATED = {"d_kv": 24, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CAUSAL: Mapping[str, Mapping[str, object]] = {
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
}
OTHERS: Mapping[str, Mapping[str, object]] = {
    "bert": {"intermediate_size": 96},
    "roberta": {"intermediate_size": 96, "pad_token_id": 1},
    "t5": _T5,
    "t5.gated": {**_T5, **_GATED},
    "vit": {"intermediate_size": 96, "image_size": 20, "patch_size": 5, "num_channels": 3, "num_labels": 10},
}
_HEADS = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "t5.gated": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}


def model(root: Path, arch: str) -> Path:
    """The folder of a random model (fp32) of this architecture, none of its norms and biases at its starting value."""
    folder = root / arch
    if folder.exists():
        return folder
    spread = {"init_std" if arch == "opt" else "initializer_range": 0.1}
    said = {**_COMMON, **_TOKENS, **spread, **{**CAUSAL, **OTHERS}[arch], "dtype": "float32"}
    config = AutoConfig.for_model(arch.partition(".")[0], **said)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        made = _HEADS.get(arch, AutoModelForCausalLM).from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    return folder

"""What sizes are derived from, beside the model that transformers makes of the same config, on no device at all."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from polygraft.cluster.policy.capacity import NF4_BYTES, serve_capacity
from tests.cluster.policy.test_capacity import CONFIGS, HELD, model


def on_meta(name: str) -> PreTrainedModel:
    """Its head apart from its embedding, as it lies in memory here."""
    config = LlamaConfig(**CONFIGS[name], tie_word_embeddings=False)  # type: ignore[arg-type]
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made


def token_bytes(made: PreTrainedModel) -> int:
    """Of the keys and values that a forward of one token leaves."""
    kept = made(torch.ones((1, 1), dtype=torch.long, device="meta"), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_as_large_as_transformers_makes_it(name: str) -> None:
    made, size = on_meta(name), model(name)
    linear = {name: one for name, one in made.named_modules() if isinstance(one, torch.nn.Linear)}
    projections = sum(one.weight.numel() for name, one in linear.items() if name != "lm_head")
    ends = made.get_input_embeddings().weight.nbytes + linear["lm_head"].weight.nbytes  # type: ignore[operator]
    assert size.projections == projections and size.token_bytes == token_bytes(made)
    assert size.weight_bytes() == ends + int(projections * (NF4_BYTES if size.quantised else 2))
    whole = sum(one.nbytes for one in made.parameters())
    assert size.quantised or 0 <= whole - size.weight_bytes() < 1e-3 * whole, "norms, in what nobody is given"


def test_four_streams_of_8k_tokens_lie_in_the_cache_of_8b_at_24_gb() -> None:
    assert serve_capacity(model("8B"), HELD["24 GB"]).kv_bytes >= 4 * 8192 * token_bytes(on_meta("8B"))

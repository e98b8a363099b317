"""Phi: one norm for attention and feed-forward, which stand beside each other, and biases everywhere, the head too."""

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.refusals import rotary

ARCHITECTURES = (
    Architecture(
        model_type="phi",
        final="final_layernorm",
        modules={
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.dense",
            "attn.out": "self_attn",
            "ffn.up": "mlp.fc1",
            "ffn.down": "mlp.fc2",
            "ffn.out": "mlp",
            "norm.1": "input_layernorm",
        },
        feeds={"norm.1": ("attn.q", "attn.k", "attn.v", "ffn.up")},
        refusal=rotary,
    ),
)

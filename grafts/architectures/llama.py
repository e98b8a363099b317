"""Llama and the families with its module names: Mistral, Qwen2 (biases on q, k and v), Qwen3 (norms on every head's
query and key); all but Llama may have sliding windows, which their attention asks for layer by layer."""

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.refusals import rotary

MODULES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.out": "self_attn",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.out": "mlp",
    "norm.1": "input_layernorm",
    "norm.2": "post_attention_layernorm",
}

ARCHITECTURES = (
    Architecture(model_type="llama", modules=MODULES, refusal=rotary, pre_norm=True),
    Architecture(model_type="mistral", modules=MODULES, refusal=rotary, pre_norm=True),
    Architecture(model_type="qwen2", modules=MODULES, refusal=rotary, pre_norm=True),
    Architecture(model_type="qwen3", modules=MODULES, refusal=rotary, pre_norm=True),
)

"""GPT-NeoX (Pythia): q, k and v of a head lie together in one module, attention and feed-forward beside each other."""

from polygraft.grafts.architectures.declare import Architecture
from polygraft.grafts.architectures.refusals import rotary

ARCHITECTURES = (
    Architecture(
        model_type="gpt_neox",
        backbone="gpt_neox",
        embedding="embed_in",
        final="final_layer_norm",
        modules={
            "attn.q": "attention.query_key_value",
            "attn.k": "attention.query_key_value",
            "attn.v": "attention.query_key_value",
            "attn.o": "attention.dense",
            "attn.out": "attention",
            "ffn.up": "mlp.dense_h_to_4h",
            "ffn.down": "mlp.dense_4h_to_h",
            "ffn.out": "mlp",
            "norm.1": "input_layernorm",
            "norm.2": "post_attention_layernorm",
        },
        interleaved=True,
        refusal=rotary,
    ),
)

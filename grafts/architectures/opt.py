"""OPT (but for the 350M one): learned positions, a feed-forward of two projections that stand in the layer itself."""

from polygraft.grafts.architectures.declare import Architecture, Config


def _refusal(config: Config) -> str | None:
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config.get("hidden_size"):
        return f"word_embed_proj_dim: {width} is not hidden_size; embeddings of another width are not supported"
    return None if config.get("do_layer_norm_before", True) else "do_layer_norm_before: false has its norms elsewhere"


ARCHITECTURES = (
    Architecture(
        model_type="opt",
        backbone="model.decoder",
        final="final_layer_norm",
        modules={
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.out_proj",
            "attn.out": "self_attn",
            "ffn.up": "fc1",
            "ffn.down": "fc2",
            "ffn.out": "fc2",
            "norm.1": "self_attn_layer_norm",
            "norm.2": "final_layer_norm",
        },
        inputs={"ffn.out": "fc1"},
        order=("attn.k", "attn.v", "attn.q", "attn.o", "ffn.up", "ffn.down"),
        fields={"ffn": "ffn_dim"},
        refusal=_refusal,
    ),
)

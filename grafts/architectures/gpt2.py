"""GPT-2: Conv1D weights lie transposed, q, k and v are thirds of one module, the feed-forward has no gate."""

from polygraft.grafts.architectures.declare import Architecture, Config


def _refusal(config: Config) -> str | None:
    return "add_cross_attention: true reads another model's states" if config.get("add_cross_attention") else None


ARCHITECTURES = (
    Architecture(
        model_type="gpt2",
        backbone="transformer",
        embedding="wte",
        layers="h",
        final="ln_f",
        modules={
            "attn.q": "attn.c_attn",
            "attn.k": "attn.c_attn",
            "attn.v": "attn.c_attn",
            "attn.o": "attn.c_proj",
            "attn.out": "attn",
            "ffn.up": "mlp.c_fc",
            "ffn.down": "mlp.c_proj",
            "ffn.out": "mlp",
            "norm.1": "ln_1",
            "norm.2": "ln_2",
        },
        transposed=True,
        fields={
            "layers": "n_layer",
            "hidden": "n_embd",
            "heads": "n_head",
            "ffn": "n_inner",
            "positions": "n_positions",
        },
        ffn_ratio=4,
        unread=("attn.masked_bias",),  # a constant of older files
        refusal=_refusal,
    ),
)

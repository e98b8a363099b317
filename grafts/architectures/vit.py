"""ViT: an encoder whose rows are the class token and the patches of an image, with norms before the sublayers."""

from polygraft.grafts.architectures.declare import Architecture

ARCHITECTURES = (
    Architecture(
        model_type="vit",
        backbone="vit",
        final="layernorm",
        modules={
            "attn.q": "attention.q_proj",
            "attn.k": "attention.k_proj",
            "attn.v": "attention.v_proj",
            "attn.o": "attention.o_proj",
            "attn.out": "attention",
            "ffn.up": "mlp.fc1",
            "ffn.down": "mlp.fc2",
            "ffn.out": "mlp",
            "norm.1": "layernorm_before",
            "norm.2": "layernorm_after",
        },
        causal=False,
        head_kind=None,
        auto="AutoModelForImageClassification",
        patches=True,
        head="classifier",
        elsewhere=("pooler.dense", "classifier"),
        unread=("pooler",),
    ),
)

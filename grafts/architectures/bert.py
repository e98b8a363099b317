"""BERT and RoBERTa: encoders whose rows see all of their sequence, with norms after the residual sums. A sublayer's
output is its last projection's, before that sum (Houlsby et al. 2019, figure 2)."""

from polygraft.grafts.architectures.declare import Architecture, Config, Transform

MODULES = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "attn.out": "attention.output.dense",
    "ffn.up": "intermediate.dense",
    "ffn.down": "output.dense",
    "ffn.out": "output.dense",
    "norm.1": "attention.output.LayerNorm",
    "norm.2": "output.LayerNorm",
}
INPUTS = {"attn.out": "attention.self", "ffn.out": "intermediate"}


def _refusal(config: Config) -> str | None:
    if config.get("is_decoder"):
        return "is_decoder: true makes a decoder of an encoder; set it to false"
    if config.get("position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type: {config['position_embedding_type']!r} is not 'absolute'"
    return None


def _roberta(config: Config) -> str | None:
    padding = config.get("pad_token_id", 1)
    return _refusal(config) if padding == 1 else f"pad_token_id: {padding!r} is not 1, from which RoBERTa counts"


ARCHITECTURES = (
    Architecture(
        model_type="bert",
        backbone="bert",
        head_kind="pooled",
        embedding="embeddings.word_embeddings",
        layers="encoder.layer",
        final=None,
        modules=MODULES,
        inputs=INPUTS,
        causal=False,
        auto="AutoModelForMaskedLM",
        feeds={},
        transform=Transform("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        elsewhere=("cls.predictions.transform.dense", "pooler.dense"),
        unread=("pooler", "cls.seq_relationship"),
        refusal=_refusal,
    ),
    Architecture(
        model_type="roberta",
        backbone="roberta",
        head_kind="dense",
        embedding="embeddings.word_embeddings",
        layers="encoder.layer",
        final=None,
        modules=MODULES,
        inputs=INPUTS,
        causal=False,
        auto="AutoModelForMaskedLM",
        feeds={},
        first_position=2,  # after the padding token's place, 1
        transform=Transform("lm_head.dense", "lm_head.layer_norm", "gelu"),
        elsewhere=("lm_head.dense", "pooler.dense"),
        unread=("pooler",),
        refusal=_roberta,
    ),
)

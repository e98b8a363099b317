"""Gemma (norm factors 1 + w, scaled embeddings), and Gemma 2 and 3, whose layers see a window or everything in turn and
have norms after each sublayer, too: a sublayer's output is what it hands to that norm."""

from polygraft.grafts.architectures.declare import Architecture, Config
from polygraft.grafts.architectures.llama import MODULES
from polygraft.grafts.architectures.refusals import rotary

BETWEEN = {**MODULES, "norm.2": "pre_feedforward_layernorm"}


def _refusal(config: Config) -> str | None:
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention: true makes an encoder of a decoder; set it to false"
    return rotary(config)


ARCHITECTURES = (
    Architecture(model_type="gemma", modules=MODULES, refusal=rotary, norm_offset=1.0),
    Architecture(model_type="gemma2", modules=BETWEEN, refusal=_refusal, norm_offset=1.0),
    Architecture(model_type="gemma3_text", modules=BETWEEN, refusal=_refusal, norm_offset=1.0),
)

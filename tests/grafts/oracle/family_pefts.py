"""Methods that PEFT 0.21 brought, and Polytropon."""

from __future__ import annotations

from collections.abc import Mapping

from peft import CPTConfig, PeftModel, PolyConfig, PveraConfig
from torch import Tensor

from polygraft.cluster.launch.demo.oracle.plain import Place, split
from tests.grafts.oracle.peft_places import layer_of, parts
from tests.grafts.oracle.row import Row

pvera = parts({"d": "pvera_lambda_d", "b": "pvera_lambda_b"}, {"A": "pvera_A", "B": "pvera_B"}, {"B": (0, 1)})


def poly(model: PeftModel, name: str, value: Tensor) -> Place:
    part, layer = split(name)[3], layer_of(model, name)
    match part:
        case "A":
            return Place(layer.poly_lora_A["default"], lambda t: t.transpose(1, 2))
        case "B":
            return Place(layer.poly_lora_B["default"])
    return Place(layer.poly_router["default"].module_logits)


def cpt(model: PeftModel, name: str, value: Tensor) -> Place:
    encoder = model.prompt_encoder["default"]
    return Place((encoder.embedding if split(name)[3] == "context" else encoder.delta_embedding).weight)


ROWS: Mapping[str, Row] = {
    "pvera": Row(
        "pvera(r=8, at=attn.[qv]|ffn.down)",
        lambda: PveraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        place=pvera,
    ),
    "poly": Row(
        "poly(r=3, skills=4, splits=2, at=attn.[qv]|ffn.down)",
        lambda: PolyConfig(r=3, n_skills=4, n_splits=2, target_modules=["q_proj", "v_proj", "down_proj"]),
        place=poly,
    ),
    "cpt": Row(
        "cpt(ids=5|17|300|42|8, types=1|2|2|3|4, epsilon=0.2)",
        lambda: CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[5, 17, 300, 42, 8],
            cpt_tokens_type_mask=[1, 2, 2, 3, 4],
            opt_projection_epsilon=0.2,
        ),
        place=cpt,
    ),
}

"""Methods that PEFT 0.21 brought, and Polytropon."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import CPTConfig, FrodConfig, PeftModel, PolyConfig, PveraConfig
from torch import Tensor

from polygraft.launch.demo.oracle.naive import Parts, after
from polygraft.launch.demo.oracle.plain import MODULES, SHARED, Place, split
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
    return Place((encoder.embedding if split(name)[3] == "context" else encoder.delta_embedding).weight)  # type: ignore[arg-type]


def frod(model: PeftModel, name: str, value: Tensor) -> Place:
    """U, which PEFT makes of W and the V that it starts with, is made again of the V that is copied in."""
    _, _, site, part = split(name)
    if site == SHARED:
        kind, _, projection = part.partition("_")
        category = MODULES[projection.replace("_", ".")].replace(".", "_")
        match kind:
            case "V":
                return Place(model.base_model.frod_V[category]["default"])
            case "i":
                return Place(model.base_model.frod_s_indices[category]["default"], lambda t: t.T)
        return Place(torch.empty_like(value))  # PEFT solves for it
    layer = layer_of(model, name)
    if part == "s":
        return Place(layer.frod_lambda_s_values["default"])

    def lengths(kept: Tensor) -> Tensor:
        columns = torch.linalg.solve(layer.frod_V["default"].to(value), layer.base_layer.weight.to(value).T).T
        layer.frod_U["default"] = columns / columns.norm(dim=0)
        return kept

    return Place(layer.frod_lambda_l["default"], lengths)


def a_basis(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """V far from singular, its inverse, and different entries beside the diagonal."""
    found = dict(values)
    for name, value in values.items():
        if ".shared.V_" in name:
            far = (value + torch.eye(len(value))).float().double()
            inverse = torch.linalg.inv(far).T
            first = inverse.float().double()
            found |= {name: far, name.replace("V_", "inverse_"): torch.stack([first, inverse - first])}
        if ".shared.i_" in name:
            width = len(values[name.replace("i_", "V_")])
            rows = torch.arange(len(value)) % width
            found[name] = torch.stack([rows, (rows + 1 + torch.arange(len(value)) // width) % width], 1).double()
    return found


def clustered(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    """y_i += b_i A_k N x for the row i in cluster k."""
    read = torch.einsum("krn,nd,...d->...kr", p["A"], p["N"], x)
    return y + (read[..., p["cluster"].long(), :] * p["B"]).sum(-1)


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
    "frod": Row(
        "frod(rate=0.02, at=attn.[qv]|ffn.down)",
        lambda: FrodConfig(sparse_rate=0.02, progressbar=False, target_modules=["q_proj", "v_proj", "down_proj"]),
        place=frod,
        fixed=a_basis,
    ),
    "adamss": Row(
        "adamss(r=12, subspaces=3, rank=2, at=attn.[qv]|ffn.down)",
        hooks=lambda: {0: after(clustered)},
        fixed=lambda values: {  # as test_adamss.py has it
            name: (torch.arange(len(value)) % 3).double() if name.endswith(".cluster") else value
            for name, value in values.items()
        },
    ),
}

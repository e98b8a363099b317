"""LoRAs made block by block, or of directions and strengths."""

from __future__ import annotations

from collections.abc import Mapping

from peft import DeloraConfig, GraloraConfig, MissConfig, PeftModel, TinyLoraConfig
from torch import Tensor
from torch.nn import functional as F

from polygraft.cluster.launch.demo.oracle.naive import Hook, Parts, after
from polygraft.cluster.launch.demo.oracle.plain import SHARED, Place, split
from tests.grafts.oracle.peft_places import layer_of, parts
from tests.grafts.oracle.row import LINEAR, Row


def qalora(scale: float, group: int) -> Hook:
    """result = x W + s ((AvgPool(x) * L) A) B with L inputs a pool (Xu et al. 2023, algorithm 1)."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        return y + scale * (F.avg_pool1d(x, group) * group) @ p["A"].T @ p["B"]

    return after(equation)


def _tinylora(model: PeftModel, name: str, value: Tensor) -> Place:
    _, _, site, part = split(name)
    if part == "v":
        vectors = model.base_model.tinylora_v["default"]
        return Place(vectors["0" if site == SHARED else layer_of(model, name)._tinylora_v_key["default"]])
    kept = getattr(layer_of(model, name), f"tinylora_{part}")["default"]
    return Place(kept, (lambda t: t.T) if part == "B" else (lambda t: t))


_MISS = parts({"D": "miss_block"})
ROWS: Mapping[str, Row] = {
    "miss": Row("miss(r=6)", lambda: MissConfig(r=6, target_modules=LINEAR), place=_MISS),
    "miss with a period": Row(
        "miss(r=8, mini=4)", lambda: MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=LINEAR), place=_MISS
    ),
    "bat": Row("bat(r=8)", lambda: MissConfig(r=8, init_weights="bat", target_modules=LINEAR), place=_MISS),
    "gralora": Row(
        "gralora(r=4, alpha=6, k=2)",
        lambda: GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LINEAR),
        place=parts({"A": "gralora_A", "B": "gralora_B"}, transposed={"A": (1, 2)}),
    ),
    "qalora": Row("qalora(r=4, alpha=8, group=8)", hooks=lambda: {0: qalora(2.0, 8)}),
    "delora": Row(
        "delora(r=4)",
        lambda: DeloraConfig(r=4, target_modules=LINEAR),
        place=parts(
            {"A": "delora_A", "B": "delora_B", "l": "delora_lambda", "w": "delora_w_norm"}, transposed={"B": (0, 1)}
        ),
    ),
    "tinylora": Row("tinylora(r=2, u=3)", lambda: TinyLoraConfig(r=2, u=3, target_modules=LINEAR), place=_tinylora),
    "tied tinylora": Row(
        "tinylora(r=3, u=5, tied=1)",
        lambda: TinyLoraConfig(r=3, u=5, weight_tying=1.0, target_modules=LINEAR),
        place=_tinylora,
    ),
}

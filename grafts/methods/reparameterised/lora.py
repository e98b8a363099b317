"""LoRA: y += (alpha / r) B A x, with A random and B zero at the start (Hu et al. 2021, arXiv 2106.09685, section
4.1)."""

from math import sqrt

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import Branch, Slot


def lora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout),)


def rslora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    """Rank-stabilised scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    return (Branch(at=at, rank=r, scale=alpha / sqrt(max(r, 1)), dropout=dropout),)


METHODS = (
    Method("lora", "arXiv 2106.09685", 3e-4, lora),
    Method("rslora", "arXiv 2312.03732", 3e-4, rslora),
)

# PEFT's fields of all LoRAs; its other starting values change W, which a folder does not say.
LORA_NAMES: dict[str, tuple[str, object]] = {"r": ("r", 8), "dropout": ("lora_dropout", 0.0)}
LORA_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
LORA_IDLE = {"init_lora_weights": True, "eva_config": None}
LORA_HARMLESS = {"init_lora_weights": ("gaussian", "eva", "mica", "orthogonal")}
LORA_KEPT = {"A": Kept("lora_A.weight"), "B": Kept("lora_B.weight", turned=(0, 1), rows=True)}
PEFT = tuple(
    Peft(
        kind="LORA",
        method=method,
        conv1d=True,
        names=LORA_NAMES | {"alpha": ("lora_alpha", 8)},
        fixed={"use_dora": False, "use_rslora": method == "rslora"},
        idle=LORA_IDLE,
        harmless=LORA_HARMLESS,
        patterns=LORA_PATTERNS,
        own=LORA_KEPT,
    )
    for method in ("lora", "rslora")
)

"""dW made from W itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections, Rank, Scale
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
_DEEPEST = 64


def hira(r: Rank = 32, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = W * (B A), elementwise, so that a factor of low rank gives a change of high rank (Huang et al. 2025, ICLR,
    OpenReview TwJrTz9cRS, eq. 6).

    Deviations: None known beside PEFT's: no scale.

    Choose when: LoRA's rank is the limit. It needs W at each step, a dense dW, and a high rate.
    """
    return (Delta(at=at, form=DeclRef("hira", (("r", r),))),)


def glora(r: Rank = 8, kind: str = "lora", at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = W * (A_d A_u) + B_d B_u, or the two as vectors over the rows with kind=vector: GLoRA's supports for weights
    (Chavan et al. 2023, arXiv 2306.07967).

    Deviations: Without the supports for biases (C, D and E in the paper) and without its search over the form of each.

    Choose when: a scale of W and an addition are wanted at once; a dense dW is made in every step.
    """
    if kind not in ("lora", "vector"):
        raise SpecError(f"peft: glora.kind: {kind!r} is not a support; choices: lora, vector")
    return (Delta(at=at, form=DeclRef("glora", (("r", r), ("kind", kind)))),)


def hiwi(r: Rank = 16, scale: Scale = 1.0, at: Projections = "ffn.*") -> tuple[Slot, ...]:
    """An adapter on the rows of W in place of on hidden states, dW = s relu(W A) B, so that its numbers can be thrown
    away after training (Liao et al. 2023, arXiv 2305.16742, section 3.2).

    Deviations: Over weights; the paper's smaller form over biases is left out.

    Choose when: an adapter's nonlinearity is wanted and no cost in serving: it merges.
    """
    return (Delta(at=at, form=DeclRef("hiwi", (("r", r), ("scale", scale)))),)


def peanut(r: Rank = 32, depth: int = 0, scale: Scale = 1.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """A network on the columns of W makes its change, dW^T = s N(W^T) B with `depth` residual layers in N (arXiv
    2410.01870, as PEFT 0.21 has it).

    Deviations: Held against PEFT; of its activations relu alone.

    Choose when: LoRA's linear map is too little. A dense dW and a pass over W in every step, which is the price.
    """
    if not 0 <= depth <= _DEEPEST:
        raise SpecError(f"peft: peanut.depth: {depth} is not between 0 and {_DEEPEST}")
    return (Delta(at=at, form=DeclRef("peanut", (("r", r), ("depth", depth), ("scale", scale)))),)


def _hira_own(slot: Delta, place: SiteShape, r: int) -> Parts:
    return {"A": TensorDecl((r, place.d_in), "kaiming"), "B": TensorDecl((place.d_out, r))}


def _hira(slot: Delta, values: Values, lowering: Lowering, r: int) -> Mapping[str, Tensor]:
    BA = values["B"] @ values["A"]
    return {"W": lowering.weight().to(BA.dtype) * BA}


def _glora_own(slot: Delta, place: SiteShape, r: int, kind: str) -> Parts:
    if kind == "vector":
        return {"A": TensorDecl((place.d_out, 1)), "B": TensorDecl((place.d_out, 1))}
    narrow, wide = TensorDecl((place.d_out, r)), TensorDecl((r, place.d_in), "kaiming")
    return {"A_d": narrow, "A_u": wide, "B_d": narrow, "B_u": wide}


def _glora(slot: Delta, values: Values, lowering: Lowering, r: int, kind: str) -> Mapping[str, Tensor]:
    A, B = (values[x] if kind == "vector" else values[f"{x}_d"] @ values[f"{x}_u"] for x in "AB")
    return {"W": lowering.weight().to(A.dtype) * A + B}


def _hiwi_own(slot: Delta, place: SiteShape, r: int, scale: float) -> Parts:
    return {"A": TensorDecl((r, place.d_in), "kaiming"), "B": TensorDecl((r, place.d_in))}


def _hiwi(slot: Delta, values: Values, lowering: Lowering, r: int, scale: float) -> Mapping[str, Tensor]:
    A, B = values["A"], values["B"]
    return {"W": scale * (lowering.weight().to(A.dtype) @ A.T).relu() @ B}


def _peanut_own(slot: Delta, place: SiteShape, r: int, depth: int, scale: float) -> Parts:
    inner = {f"{name}{i}": TensorDecl((r, r), "kaiming") for name in ("encoder", "decoder") for i in range(depth)}
    return {"A": TensorDecl((r, place.d_out), "kaiming"), **inner, "B": TensorDecl((place.d_out, r))}


def _peanut(slot: Delta, values: Values, lowering: Lowering, r: int, depth: int, scale: float) -> Mapping[str, Tensor]:
    A, B = values["A"], values["B"]
    h = (lowering.weight().to(A.dtype).T @ A.T).relu()
    outer = []
    for i in range(depth):
        outer.append(h)
        h = (h @ values[f"encoder{i}"].T).relu()
    for i in range(depth):
        h = (h @ values[f"decoder{i}"].T).relu() + outer.pop()
    return {"W": scale * B @ h.T}


METHODS = (
    Method("hira", "OpenReview TwJrTz9cRS", 4.5e-3, hira),
    Method("glora", "arXiv 2306.07967", 1e-4, glora),
    Method("hiwi", "arXiv 2305.16742", 1e-3, hiwi),
    Method("peanut", "arXiv 2410.01870", 1e-4, peanut),
)
PARAMETRIZATIONS = (
    Parametrization("hira", _hira, _hira_own),
    Parametrization("glora", _glora, _glora_own),
    Parametrization("hiwi", _hiwi, _hiwi_own),
    Parametrization("peanut", _peanut, _peanut_own),
)
_STARTS: dict[str, object] = {"init_weights": True}
_CONSTANT = (lambda value, place: value[0], lambda stored, place: stored.expand(place.d_out, 1))


def _glora_shift(
    stored: Values, module: str, slot: Slot, number: Callable[[str], Tensor | None]
) -> tuple[Tensor, set[str]] | None:
    """b' - b = b * D + E + W C of the supports for biases, which PEFT has where there is a bias."""
    parts = {f"{x}{part}": f"{module}.glora_{x}.{part}" for x in "CDE" for part in ("X", "Xd", "Xu")}
    found = {name: stored[key].double() for name, key in parts.items() if key in stored}
    if not found or (b := number("bias")) is None or (W := number("weight")) is None:
        return None
    change = b * found.get("DX", 0.0) + found.get("EX", 0.0)
    if "CXd" in found or "CX" in found:
        change = change + (W.double() @ (found["CX"] if "CX" in found else found["CXd"] @ found["CXu"])).squeeze(-1)
    return change, {parts[name] for name in found}


def _glora_folder(**said: Any) -> Peft:
    own = {
        "A": Kept("glora_A.X"),
        "B": Kept("glora_B.X"),
        "A_d": Kept("glora_A.Xd"),
        "A_u": Kept("glora_A.Xu"),
        "B_d": Kept("glora_B.Xd"),
        "B_u": Kept("glora_B.Xu"),
    }
    return Peft(
        kind="GLORA",
        method="glora",
        idle=_STARTS,
        layered=False,
        blank=lambda place: {
            "glora_C.zeros": (place.d_in, 1),
            "glora_D.zeros": (place.d_out,),
            "glora_E.zeros": (place.d_out,),
        },
        **{"own": own, **said},
    )


PEFT = (
    Peft(
        kind="HIRA",
        method="hira",
        biases=False,
        separable=True,
        conv1d=True,
        names={"r": ("r", 32)},
        idle=_STARTS | {"hira_dropout": None, "rank_pattern": {}},  # PEFT 0.21 gives every module the rank r
        own={"A": Kept("hira_A"), "B": Kept("hira_B", rows=True)},
    ),
    _glora_folder(
        names={"r": ("r", 8), "kind": ("config_A_B", "lora")}, fixed={"config_C": "none", "config_D_E": "none"}
    ),
    _glora_folder(
        names={"r": ("r", 8)},
        arguments=lambda config: {"kind": "vector"},
        fixed={"config_A_B": "constant"},
        reads=("config_C", "config_D_E"),
        shift=_glora_shift,
        own={part: Kept(f"glora_{part}.X", coded=_CONSTANT) for part in "AB"},
        only="folder",
    ),
    _glora_folder(
        names={"r": ("r", 8), "kind": ("config_A_B", "lora")},
        reads=("config_C", "config_D_E"),
        shift=_glora_shift,
        only="folder",
    ),
    Peft(
        kind="PEANUT",
        method="peanut",
        biases=False,
        names={"r": ("r", 32), "depth": ("depth", 0), "scale": ("scaling", 1.0)},
        needs={"act_fn": "relu"},
        idle=_STARTS,
        own={
            "A": Kept("peanut_A.weight"),
            "B": Kept("peanut_B.weight"),
            **{f"encoder{i}": Kept(f"peanut_encoders.{i}.weight") for i in range(_DEEPEST)},
            **{f"decoder{i}": Kept(f"peanut_decoders.{i}.weight") for i in range(_DEEPEST)},
        },
    ),
)

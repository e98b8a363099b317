"""Adapters with biases, scales and shifts, norms."""

from __future__ import annotations

from collections.abc import Mapping

from peft import BeftConfig, LNTuningConfig, PeftModel
from torch import Tensor
from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, after, ia3_after
from polygraft.launch.demo.oracle.plain import Place, module_of, split
from tests.grafts.oracle.row import Row


def affine() -> Hook:
    """y = gamma y + beta (Lian et al. 2022, section 3)."""
    return after(lambda x, y, p: p["g"] * y + p["b"])


def shift() -> Hook:
    """The bias of an adapter's second projection: h + W_up act(W_down h + b_down) + b_up in two hooks."""
    return after(lambda x, y, p: y + p["b"])


def pfeiffer() -> Hook:
    """U ReLU(D h) + r with h and r the layer's output (Pfeiffer et al. 2021, MAD-X eq. 1), D with a bias."""
    return after(lambda x, y, p: y + F.relu(y @ p["A"].T + p["a"].T) @ p["B"])


def houlsby() -> Hook:
    """h + W_up gelu(W_down h + b_down) on a sublayer's output (Houlsby et al. 2019, figure 2)."""
    return after(lambda x, y, p: y + F.gelu(y @ p["A"].T + p["a"].T) @ p["B"])


def parallel(scale: float) -> Hook:
    """h + s ReLU(x W_down + b_down) W_up (He et al. 2022, table 1; Chen et al. 2022, eq. 3)."""
    return after(lambda x, y, p: y + scale * F.relu(x @ p["A"].T + p["a"].T) @ p["B"])


def scaled() -> Hook:
    """h + s ReLU(x W_down) W_up with s trained (He et al. 2022, table 1)."""
    return after(lambda x, y, p: y + p["s"] * (F.relu(x @ p["A"].T) @ p["B"]))


def plain(scale: float) -> Hook:
    """h + s ReLU(x W_down) W_up (He et al. 2022, table 1)."""
    return after(lambda x, y, p: y + scale * F.relu(x @ p["A"].T) @ p["B"])


def _ln(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, _ = split(name)  # the tiny model's norms are ones, so that a factor is the weight itself
    return Place(model.get_parameter(f"base_model.model.{module_of(layer, site)}.ln_tuning_layers.default.weight"))


def _beft(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, _ = split(name)
    module = model.get_submodule(f"base_model.model.{module_of(layer, site)}")
    return Place(module.beft_bias["default"], lambda t: t.view(-1))


ROWS: Mapping[str, Row] = {
    "ln-tuning": Row(
        "ln-tuning",
        lambda: LNTuningConfig(task_type="CAUSAL_LM"),
        hooks=lambda: {0: ia3_after()},
        place=_ln,
        llama_only="PEFT trains a norm's weight in place of a factor on it; they are the same where it is one",
    ),
    "beft": Row("beft", lambda: BeftConfig(target_modules=["v_proj"]), place=_beft),
    "ssf": Row("ssf", hooks=lambda: {0: affine()}),
    "pfeiffer": Row("pfeiffer(8)", hooks=lambda: {0: pfeiffer(), 1: shift()}),
    "adapterdrop": Row("pfeiffer(6)@1", hooks=lambda: {0: pfeiffer(), 1: shift()}),
    "serial with biases": Row("serial(8, bias=1)", hooks=lambda: {0: houlsby(), 1: shift()}),
    "parallel at projections with biases": Row(
        "parallel(3, scale=2, at=attn.q|ffn.down, bias=1) + lora(r=2, alpha=4, at=attn.o)",
        hooks=lambda: {
            0: parallel(2.0),
            1: shift(),
            2: after(lambda x, y, p: y + 2.0 * (x @ p["A"].T) @ p["B"]),
        },
    ),
    "scaled-parallel": Row("scaled-parallel(8)", hooks=lambda: {0: scaled()}),
    "adaptformer": Row("adaptformer(8)", hooks=lambda: {0: parallel(0.1), 1: shift()}),
    "mam": Row("mam(length=3, size=16)", hooks=lambda: {1: plain(4.0)}),
}

"""Prefixes, prompts and edits of the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace

import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.tuners.adaption_prompt import layer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from polygraft.launch.demo.oracle.naive import Hook, Parts, after
from polygraft.launch.demo.oracle.plain import Place, module_of, split
from tests.grafts.oracle.family_gated_prefix import llama_adapter, model
from tests.grafts.oracle.row import Row, Values
from tests.grafts.packing import PROMPT

ENCODER = "prompt_encoder.default"
EDITED = (338, 37, 176)  # tokens of the table's prompts


Edit = Callable[[Tensor, Parts], Tensor]


def at_ends(edit: Edit, first: int, last: int, prompt: int) -> Hook:
    """`edit` of the positions {1, ..., first} and {n - last + 1, ..., n} of a prompt of n tokens (Wu et al. 2024,
    section 4), in the residual stream of a sequence that goes on after it."""

    def equation(x: Tensor, y: Tensor, p: Parts) -> Tensor:
        n = min(prompt, y.shape[-2])
        edited = sorted({*range(min(first, n)), *range(max(n - last, 0), n)})
        return y.index_copy(-2, torch.tensor(edited), edit(y[..., edited, :], p))

    return after(equation)


def noreft(y: Tensor, p: Parts) -> Tensor:
    """h + R^T (W h + b - R h) (Wu et al. 2024, eq. 2) for any R, as in AdapterHub's NoReFT."""
    return y + (y @ p["W"].T + p["b"].T - y @ p["R"].T) @ p["R"]


def loreft(y: Tensor, p: Parts) -> Tensor:
    """The same with orthonormal rows R, kept so by torch's own parametrisation of its transpose."""
    holder = nn.Linear(*p["R"].shape, bias=False, dtype=y.dtype)  # type: ignore[misc]  # weight [d, r]
    orthogonal(holder, orthogonal_map="householder", use_trivialization=False)
    R = holder.parametrizations.weight[0](p["R"].T).T
    assert torch.allclose(R @ R.T, torch.eye(len(R), dtype=R.dtype), atol=1e-5)
    return y + (y @ p["W"].T + p["b"].T - y @ R.T) @ R


def direft(y: Tensor, p: Parts) -> Tensor:
    """h + W2^T (W1 h + b) (Wu et al. 2024, eq. 3)."""
    return y + (y @ p["A"].T + p["a"].T) @ p["B"]


def ends_of(*edits: tuple[Edit, int, int], prompt: int = PROMPT) -> Mapping[int, Hook]:
    """The hooks of slots that edit so many first and last tokens."""
    return {slot: at_ends(edit, first, last, prompt) for slot, (edit, first, last) in enumerate(edits)}


def _with_signs(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch keeps the signs of its columns on the diagonal."""
    for name, value in values.items():
        if name.endswith(".R"):
            value.fill_diagonal_(1.0)
    return values


def _prefix_mlp(model: PeftModel, name: str, value: Tensor) -> Place:
    part = split(name)[3]
    names = {"E": "embedding.weight", "W1": "transform.0.weight", "b1": "transform.0.bias"}
    names |= {"W2": "transform.2.weight", "b2": "transform.2.bias"}
    return Place(model.get_parameter(f"{ENCODER}.{names[part]}"))


def _adaption_config() -> AdaptionPromptConfig:
    """PEFT asks for the softmax in float32 beside float64, too; here it gets the wider of the two."""

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return scores.to(torch.promote_types(scores.dtype, dtype)).softmax(dim)

    layer.F = SimpleNamespace(softmax=softmax)  # type: ignore[assignment,attr-defined]
    return AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=6, adapter_layers=2)


def _adaption(model: PeftModel, name: str, value: Tensor) -> Place:
    _, number, _, part = split(name)
    attention = f"base_model.model.{module_of(number, 'attn.out')}"
    if part == "gate":
        return Place(model.get_parameter(f"{attention}.adaption_gate"))
    return Place(model.get_parameter(f"{attention}.adaption_prompt"), lambda t: t.view(value.shape))


def _prompt(model: PeftModel, name: str, value: Tensor) -> Place:
    return Place(model.get_parameter(f"{ENCODER}.embedding.weight"))


def _encoder(layers: tuple[int, ...]) -> Callable[[PeftModel, str, Tensor], Place]:
    """P-tuning's: the network's linear layers are at `layers` of PEFT's."""

    def place(model: PeftModel, name: str, value: Tensor) -> Place:
        part, number = split(name)[3][:-1], split(name)[3][-1]
        if split(name)[3] == "E":
            return _prompt(model, name, value)
        if part in ("W", "b"):
            kind = "weight" if part == "W" else "bias"
            return Place(model.get_parameter(f"{ENCODER}.mlp_head.{layers[int(number) - 1]}.{kind}"))
        kind = {"Wi": "weight_ih", "Wh": "weight_hh", "bi": "bias_ih", "bh": "bias_hh"}[part]
        cell = f"l{int(number) // 2}{'_reverse' if int(number) % 2 else ''}"
        return Place(model.get_parameter(f"{ENCODER}.lstm_head.{kind}_{cell}"))

    return place


def before(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """[P; E(x)] (Lester et al. 2021, section 2), for images [P; x, E] (Jia et al. 2022, arXiv 2203.12119, eq. 4)."""
    return torch.cat([p["0.0.embed.p"], x])


def dept(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """[P; E(x) + A B] for the first tokens (Shi & Lipani 2024, section 2.2)."""
    offset = (p["1.0.embed.A"] @ p["1.0.embed.B"])[: len(x)]
    return torch.cat([p["0.0.embed.p"], x[: len(offset)] + offset, x[len(offset) :]])


def factored(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """P = A B (Xiao et al. 2023, section 3)."""
    return torch.cat([p["0.0.embed.A"] @ p["0.0.embed.B"], x])


def residual(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """P_i + Phi(P_i), Phi = LayerNorm(W_up ReLU(W_down .)) (Razdaibiedina et al. 2023, section 3)."""
    P, A, B, g, b = (p[f"0.0.embed.{part}"] for part in ("P", "A", "B", "g", "b"))
    up = torch.relu(P @ A.T) @ B
    centred = up - up.mean(1, keepdim=True)
    return torch.cat([P + g * centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() + b, x])


def rank_one(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """P * (u v^T), elementwise (Wang et al. 2023, section 3)."""
    return torch.cat([p["0.0.embed.P"] * torch.outer(p["0.0.embed.u"][:, 0], p["0.0.embed.v"][0]), x])


def masked(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """gamma_i (zeta_i,1 q_i,1; ...; zeta_i,k q_i,k) for the pieces q of row i (Ma et al. 2022, section 3)."""
    P, rows, pieces = (p[f"0.0.embed.{part}"] for part in ("P", "rows", "pieces"))
    cut = [
        torch.cat(
            [rows[i, 0] * zeta * piece for zeta, piece in zip(pieces[i], row.chunk(pieces.shape[1]), strict=True)]
        )
        for i, row in enumerate(P)
    ]
    return torch.cat([torch.stack(cut), x])


def _half_masked(values: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in values.items():
        if name.endswith(("rows", "pieces")):
            value.copy_(value > 0)
    values["0.0.embed.rows"][0] = values["0.0.embed.pieces"][0, 1] = 1
    return values


def _cartridge(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, _, part = split(name)
    whole = model.get_parameter(f"{ENCODER}.{'frozen' if part.endswith('0') else 'trainable'}_embedding")
    index = 2 * layer + part.startswith("v")
    return Place(whole, lambda t: t.view(len(t), -1, value.shape[1])[:, index])


def inverted(ids: Tensor, x: Tensor, p: Values) -> Tensor:
    """E(x) with the learned vector v* where a given token is (Gal et al. 2022, section 3)."""
    for token, row in zip(EDITED, p["0.0.embed.p"], strict=True):
        x = torch.where((ids == token).unsqueeze(1), row, x)
    return x


ROWS: Mapping[str, Row] = {
    "loreft": Row("loreft(r=4, first=2, last=1)", hooks=partial(ends_of, (loreft, 2, 1)), fixed=_with_signs),
    "loreft of all tokens": Row(
        "loreft(r=4, first=0, last=0)", hooks=lambda: {0: after(lambda x, y, p: loreft(y, p))}, fixed=_with_signs
    ),
    "reft of each end": Row(
        "loreft(r=4, first=2, last=0) + direft(r=3, first=0, last=2)",
        hooks=partial(ends_of, (loreft, 2, 0), (direft, 0, 2)),
        fixed=_with_signs,
    ),
    "noreft": Row("noreft(r=4)@1", hooks=partial(ends_of, (noreft, 7, 7))),
    "direft": Row("direft(r=3, first=0, last=3)", hooks=partial(ends_of, (direft, 0, 3))),
    "prefix-mlp": Row(
        "prefix-mlp(length=5, hidden=24)",
        lambda: PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=24, prefix_projection=True
        ),
        place=_prefix_mlp,
    ),
    "llama-adapter": Row(
        "llama-adapter(length=6)",
        _adaption_config,
        place=_adaption,
        llama_only="PEFT's adaption prompt computes Llama's attention itself",
        model=model(llama_adapter, {}, apart=True),
    ),
    "prompt": Row(
        "prompt(6)",
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
        place=_prompt,
        soft=before,
    ),
    "p-tuning": Row(
        "p-tuning(5, hidden=12)",
        lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12),
        place=_encoder((0, 2, 4)),
    ),
    "p-tuning by lstm": Row(
        "p-tuning(5, hidden=12, encoder=lstm)",
        lambda: PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=5,
            encoder_hidden_size=12,
            encoder_reparameterization_type="LSTM",
            encoder_dropout=0.0,
        ),
        place=_encoder((0, 2)),
    ),
    "cartridge": Row(
        "cartridge(6, frozen=2)",
        lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, num_frozen_tokens=2),
        place=_cartridge,
    ),
    "dpt": Row("dpt(6, r=2)", soft=factored),
    "residual-prompt": Row("residual-prompt(5, size=7)", soft=residual),
    "mpt": Row("mpt(5)", soft=rank_one),
    "pruned-prompt": Row("pruned-prompt(6, pieces=4)", soft=masked, fixed=_half_masked),
    "dept": Row("dept(4, rows=9, r=2)", soft=dept),
    "trainable-tokens": Row(f"trainable-tokens({'|'.join(map(str, EDITED))})", soft=inverted),
}

"""One graft on an unmodified transformers Llama by forward hooks: slow, obvious, nothing shared with our runtime, not
even the builder of rows, which is under test with the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.sites import ModelShape, Site, module_path
from polygraft.grafts.spec import KV, Affine, Branch, GraftSpec, Norm

ACTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def random_tensors(graft: BoundGraft, seed: int) -> dict[str, Tensor]:
    """Values that change the output a lot, whatever the method's start would be."""
    made = torch.Generator().manual_seed(seed)
    values = {}
    for tensor in graft.tensors:
        noise = torch.randn(tensor.shape, generator=made)
        one_based = tensor.part in ("g", "m")
        values[tensor.name] = 1 + 0.2 * noise if one_based else 0.2 * noise
    return values


class Solo:
    """The backbone in `folder` with one graft, or bare."""

    def __init__(self, folder: Path, shape: ModelShape, graft: BoundGraft | None, values: Mapping[str, Tensor]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._shape = shape
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        acts: dict[Site, list[int]] = {}
        for index, site in graft.sites if graft else ():
            acts.setdefault(site, []).append(index)
        for site, slots in acts.items():
            assert graft is not None
            if isinstance(graft.spec.slots[slots[0]], KV):
                self._prefix[site.layer] = (values[f"{slots[0]}.{site}.k"], values[f"{slots[0]}.{site}.v"])
            else:
                _hook(self._model.model.get_submodule(module_path(site, shape)), graft.spec, slots, site, values)

    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), vocab] of the whole sequence, computed afresh."""
        cache = DynamicCache()
        for layer in range(self._shape.layers):
            if layer in self._prefix:
                k, v = (x.view(1, len(x), self._shape.kv_heads, -1).transpose(1, 2) for x in self._prefix[layer])
                cache.update(k, v, layer)
        with torch.no_grad():
            out: Tensor = self._model(torch.tensor([ids]), past_key_values=cache).logits[0]
        return out

    def greedy(self, ids: tuple[int, ...], count: int) -> list[int]:
        said = list(ids)
        for _ in range(count):
            said.append(int(self.logits(said)[-1].argmax()))
        return said[len(ids) :]


def _hook(module: nn.Module, spec: GraftSpec, slots: list[int], site: Site, values: Mapping[str, Tensor]) -> None:
    def part(slot: int, name: str) -> Tensor | None:
        return values.get(f"{slot}.{site}.{name}")

    def affine(slot: int, x: Tensor) -> Tensor:
        g, b = part(slot, "g"), part(slot, "b")
        return x * (1 if g is None else g) + (0 if b is None else b)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        for slot in slots:
            op = spec.slots[slot]
            if isinstance(op, Affine) and op.side == "in":
                x = affine(slot, x)
        return (x, *args[1:])

    def after(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], result: object) -> object:
        y = result[0] if isinstance(result, tuple) else result
        assert isinstance(y, Tensor)
        x = args[0] if args else kwargs["hidden_states"]
        plain = y
        for slot in slots:
            op = spec.slots[slot]
            if isinstance(op, Branch):
                A, B = part(slot, "A"), part(slot, "B")
                assert A is not None and B is not None
                y = y + op.scale * ACTS[op.act]((plain if op.tap == "output" else x) @ A.T) @ B
        for slot in slots:
            if isinstance(spec.slots[slot], Norm):
                weight = module.weight
                assert isinstance(weight, Tensor)
                for branch in slots:
                    op = spec.slots[branch]
                    if isinstance(op, Branch):
                        weight = weight + op.scale * part(branch, "B").T @ part(branch, "A")  # type: ignore[union-attr,operator]
                y = y * (part(slot, "m") / weight.norm(dim=1))
        for slot in slots:
            op = spec.slots[slot]
            if isinstance(op, Affine) and op.side == "out":
                y = affine(slot, y)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    if any(isinstance(spec.slots[slot], Affine) and spec.slots[slot].side == "in" for slot in slots):  # type: ignore[union-attr]
        module.register_forward_pre_hook(before)
    module.register_forward_hook(after, with_kwargs=True)

"""The linears of one SmolLM2 layer under rows of distinct LoRA grafts, done in each of the arms' ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import pairwise
from statistics import median

import torch
from child import Reply, Round, answer, task, work
from record import Check, Gate
from torch import Tensor, nn
from torch.nn import functional as F

from polygraft.grafts.runtime.fused import FusedBranches
from polygraft.grafts.runtime.linears.choose import frozen_linear
from polygraft.grafts.runtime.linears.plain import PlainLinear
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.route import Span, work_list
from polygraft.grafts.runtime.stack import StackSlice, StackSlices
from polygraft.kernels.branch import cost
from polygraft.kernels.dense.op import FusedBranch

HIDDEN, KEYS, INNER = 576, 192, 1536  # SmolLM2-135M
GROUPS = ((HIDDEN, (HIDDEN, KEYS, KEYS)), (HIDDEN, (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)))  # by input
GRAFTS, RANK, SCALE = 8, 16, 2.0
BF16 = torch.bfloat16
ROUNDED = 1e-2  # rel-L2 to float64
MATTERS = 0.1  # what the grafts at least change, rel-L2
WAYS = ("base", "own", "ours", "loop", "peft", "grouped")


class Layer:
    """Weights of every projection, each graft's A [rank, in] and B [rank, out] beside it, and rows for every group."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, size: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * size).to(BF16)

        self.rows = rows
        self.x = [normal(rows, width, size=1.0) for width, _ in GROUPS]
        self.W = [[normal(out, width, size=width**-0.5) for out in outs] for width, outs in GROUPS]
        self.A = [[normal(GRAFTS * RANK, width, size=width**-0.5) for _ in outs] for width, outs in GROUPS]
        self.B = [[normal(GRAFTS * RANK, out, size=0.2) for out in outs] for _, outs in GROUPS]
        self.ends = [(i + 1) * rows // GRAFTS for i in range(GRAFTS)]

    def way(self, kind: str, variant: str) -> Callable[[], list[Tensor]]:
        """A pass through the layer: the outputs of all projections, in order."""
        if kind == "peft":
            return self._peft()
        base = self._base("compiled" if kind == "own" else variant)
        match kind:
            case "base" | "own":
                return lambda: [y for i in range(len(GROUPS)) for y in base(i)]
            case "least":
                return self._least(base)
            case "ours":
                return self._ours()
            case "loop":
                return self._beside(base, self._loop)
            case "grouped":
                ends = torch.tensor(self.ends, dtype=torch.int32)
                return self._beside(base, lambda y, x, A, B: self._grouped(y, x, A, B, ends))
        raise KeyError(kind)

    def _base(self, variant: str) -> Callable[[int], Sequence[Tensor]]:
        """A group's projections as one product; `plain` weights or prepacked ones."""
        made: dict[str, Callable[..., FrozenLinear]] = {
            "plain": partial(PlainLinear, prepack=False),
            "packed": PlainLinear,
            "compiled": partial(frozen_linear, prepack=True, block=None),
        }
        linears = [made[variant or "packed"](W, [None] * len(W)) for W in self.W]
        return lambda i: linears[i].product(self.x[i]).split_with_sizes(linears[i].widths, dim=1)

    def _least(self, base: Callable[[int], Sequence[Tensor]]) -> Callable[[], list[Tensor]]:
        """What any branch after a finished product costs at least: its group's A and B read once, the results read and
        written once."""
        pairs = zip(self.A, self.B, strict=True)
        grafts = [torch.cat([w.flatten() for w in (*As, *Bs)]).view(torch.float32) for As, Bs in pairs]

        def group(i: int) -> Sequence[Tensor]:
            products = base(i)
            grafts[i].sum()
            joined = products[0].as_strided((self.rows, sum(y.shape[1] for y in products)), products[0].stride())
            joined.neg_()
            return products

        return lambda: [y for i in range(len(GROUPS)) for y in group(i)]

    def _ours(self) -> Callable[[], list[Tensor]]:
        linears = [frozen_linear(W, [None] * len(W), prepack=True, block=None) for W in self.W]
        slices = StackSlices(tuple(StackSlice(j, j * RANK, (j + 1) * RANK, SCALE) for j in range(GRAFTS)))
        fused = [
            FusedBranches(
                tuple((FusedBranch(m, A, B, "identity"), slices) for m, (A, B) in enumerate(zip(As, Bs, strict=True)))
            )
            for As, Bs in zip(self.A, self.B, strict=True)
        ]
        spans = [Span(start, stop, j) for j, (start, stop) in enumerate(pairwise((0, *self.ends)))]
        segments = cache(partial(work_list, spans))
        return lambda: [
            y
            for x, w, branches in zip(self.x, linears, fused, strict=True)
            for y in project(x, w, branches.routed(segments))
        ]

    def _beside(
        self, base: Callable[[int], Sequence[Tensor]], add: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> Callable[[], list[Tensor]]:
        return lambda: [
            add(y, self.x[i], A, B)
            for i in range(len(GROUPS))
            for y, A, B in zip(base(i), self.A[i], self.B[i], strict=True)
        ]

    def _loop(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        start = 0
        for j, end in enumerate(self.ends):
            own = slice(j * RANK, (j + 1) * RANK)
            y[start:end].addmm_(x[start:end] @ A[own].T, B[own], alpha=SCALE)
            start = end
        return y

    def _grouped(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, ends: Tensor) -> Tensor:
        hidden = F.grouped_mm(x, A.view(GRAFTS, RANK, -1).transpose(1, 2), offs=ends)
        return y.add_(F.grouped_mm(hidden, B.view(GRAFTS, RANK, -1), offs=ends), alpha=SCALE)

    def _peft(self) -> Callable[[], list[Tensor]]:
        """PEFT's own LoRA layers, told by `adapter_names` which sequence is whose."""
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK))
        found: list[tuple[Tensor, list[nn.Module]]] = []
        sequences = min(self.rows, 16)  # a token of each at decode, else 64 rows a graft in two
        names = [f"graft-{i * GRAFTS // sequences}" for i in range(sequences)]
        for x, Ws, As, Bs in zip(self.x, self.W, self.A, self.B, strict=True):
            layers: list[nn.Module] = []
            for W, A, B in zip(Ws, As, Bs, strict=True):
                plain = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=BF16)
                plain.weight = nn.Parameter(W, requires_grad=False)
                layer = Linear(plain, "graft-0", config, r=RANK, lora_alpha=config.lora_alpha)
                for j in range(GRAFTS):
                    if j:
                        layer.update_layer(f"graft-{j}", RANK, config.lora_alpha, config)
                    own = slice(j * RANK, (j + 1) * RANK)
                    layer.lora_A[f"graft-{j}"].weight = nn.Parameter(A[own], requires_grad=False)
                    layer.lora_B[f"graft-{j}"].weight = nn.Parameter(B[own].T.contiguous(), requires_grad=False)
                layers.append(layer.eval())
            found.append((x.view(sequences, -1, x.shape[1]), layers))
        return lambda: [layer(x, adapter_names=names).flatten(0, 1) for x, layers in found for layer in layers]

    def truth(self, *, grafts: bool) -> list[Tensor]:
        """The outputs in float64."""
        outs = []
        for x, Ws, As, Bs in zip(self.x, self.W, self.A, self.B, strict=True):
            for W, A, B in zip(Ws, As, Bs, strict=True):
                y = x.double() @ W.double().T
                start = 0
                for j, end in enumerate(self.ends if grafts else ()):
                    own = slice(j * RANK, (j + 1) * RANK)
                    y[start:end] += SCALE * x[start:end].double() @ A[own].double().T @ B[own].double()
                    start = end
                outs.append(y)
        return outs

    def work(self) -> tuple[int, int]:
        """(flops, bytes) of a pass: the backbone's weights, and every graft's once, with the rows."""
        flops = moved = 0
        for width, outs in GROUPS:
            flops += 2 * self.rows * width * sum(outs)
            moved += 2 * (width * sum(outs) + self.rows * (width + sum(outs)))
            for out in outs:
                shapes = [(self.rows // GRAFTS, RANK)] * GRAFTS
                flops += cost.flops(shapes, width, out)
                moved += cost.bytes_moved(shapes, width, out, itemsize=2)
        return flops, moved


class Way:
    """An arm: `size` passes a round; its figure is that of the median pass."""

    def __init__(self, rows: int, kind: str, variant: str, size: int) -> None:
        self._rows, self._kind, self._variant, self._size = rows, kind, variant, size

    def load(self) -> str:
        self._pass = Layer(self._rows).way(self._kind, self._variant)
        return "bfloat16"

    @torch.inference_mode()
    def warm(self) -> None:
        for _ in range(5):
            self._pass()

    @torch.inference_mode()
    def round(self) -> Round:
        return Round(self._rows, 0.0, median(seconds(self._pass) for _ in range(self._size)))


class Roof:
    """The machine's own: the work's bytes at the bandwidth of a long sum, or its flops at the pace of a large product,
    whichever takes longer, both measured here."""

    def __init__(self, rows: int, size: int) -> None:
        self._layer, self._size = Layer(rows), size

    def load(self) -> str:
        self._long = torch.ones(1 << 26, dtype=torch.float32)  # 256 MiB
        self._square = torch.randn(2048, 2048).to(BF16)
        return "bfloat16"

    def warm(self) -> None:
        self.round()

    @torch.inference_mode()
    def round(self) -> Round:
        flops, moved = self._layer.work()
        bandwidth = self._long.nbytes / min(seconds(self._long.sum) for _ in range(5))
        pace = 2 * 2048**3 / min(seconds(lambda: self._square @ self._square) for _ in range(5))
        return Round(self._layer.rows, 0.0, max(flops / pace, moved / bandwidth))


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def check(rows: Sequence[int]) -> Gate:
    """Every way's outputs against float64."""
    checks: list[Check] = []
    for count in rows:
        layer = Layer(count)
        bare, true = layer.truth(grafts=False), layer.truth(grafts=True)
        checks.append(Check(f"{count} rows: what the grafts change", min(map(rel_l2, bare, true)), MATTERS, least=True))
        for kind in WAYS:
            with torch.inference_mode():
                found = layer.way(kind, "")()
            wanted = bare if kind in ("base", "own") else true
            checks.append(Check(f"{count} rows: {kind}, rel-L2 to float64", max(map(rel_l2, found, wanted)), ROUNDED))
    return Gate(tuple(checks))


def rel_l2(found: Tensor, wanted: Tensor) -> float:
    """rel-L2; NaN is infinitely far, so that a maximum shows it."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return float("inf") if error != error else error


if __name__ == "__main__":
    given = task()
    torch.set_num_threads(given.threads)
    if given.kind == "gate":

        def _check() -> Reply:
            return asdict(check(given.jobs))

        answer({"check": _check})
    elif given.kind == "roof":
        work(Roof(given.jobs[0], given.size))
    else:
        work(Way(given.jobs[0], given.kind, given.variant, given.size))

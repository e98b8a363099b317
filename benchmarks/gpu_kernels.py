"""The ops' programs on the GPU: the checks of the interpreter's tests, every op in bf16 beside the CPU in float64, and
how long each takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from types import ModuleType
from unittest.mock import patch

import torch
from gpu_card import Card, peaks
from gpu_findings import Fact, Findings
from gpu_material import relative
from machine import ROOT
from tests_folder import tests_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polygraft.kernels.affine import gpu as affine_gpu
from polygraft.kernels.branch import gpu as branch_gpu
from polygraft.kernels.branch.op import branch
from polygraft.kernels.common.bench import Case
from polygraft.kernels.kv import gpu as kv_gpu
from polygraft.kernels.kv.tiles import PagedTiles
from polygraft.kernels.nf4 import gpu as nf4_gpu
from polygraft.kernels.norm import gpu as norm_gpu
from polygraft.kernels.rotate import gpu as rotate_gpu
from polygraft.kernels.sparse import gpu as sparse_gpu
from polygraft.kernels.sparse.order import SparseIndex

OPS = ("affine", "branch", "delta", "kv", "nf4", "norm", "rotate", "sparse", "tokens")
ROUNDED = 2e-2  # rel-L2 to float64 of what bf16 computes from the same inputs
_ENTRIES = (
    (affine_gpu, "affine"),
    (branch_gpu, "branch"),
    (kv_gpu, "attend"),
    (kv_gpu, "attend_with_sums"),
    (kv_gpu, "attend_paged"),
    (nf4_gpu, "linear"),
    (norm_gpu, "row_norm"),
    (rotate_gpu, "blocks"),
    (sparse_gpu, "sparse"),
)
_OF_THE_CPU = ("sorted once", "strided")  # what copying to the device and back takes away
_DRY_EVERY = 40


def checks(card: Card, findings: Findings, share: int = 0, shares: int = 1) -> None:
    """The tests' checks, which compare with the references and a segment alone with one in company bit for bit; of
    every `shares` one."""
    chosen = list(_interpreted().items())[share :: shares if card.real else _DRY_EVERY]
    wrong: list[str] = []
    with ExitStack() as stack:
        for module, name in _ENTRIES:
            stack.enter_context(patch.object(module, name, _through(card, getattr(module, name))))
        for place, (name, check) in enumerate(chosen):
            if findings.left <= 0:
                findings.leave_out(f"checks from {name} on", f"{len(chosen) - place} were not reached in time")
                break
            try:
                check()
                findings.done.append(name)
            except AssertionError as error:
                if card.real:
                    wrong.append(name)
                    findings.failed[name] = str(error)[:600]
            except Exception as error:
                wrong.append(name)
                findings.failed[name] = f"{type(error).__name__}: {error}"[:600]
    findings.fact("checks", len(findings.done))
    findings.claim(f"kernels.checks_that_fail.{share}", len(wrong), "checks", "<", 1)


def _interpreted() -> dict[str, Callable[[], None]]:
    """By name; importing them sets what makes Triton interpret, when our programs are defined already."""
    tests_of(ROOT)
    with patch.dict(os.environ):
        branch, others = (import_module(f"tests.kernels.{name}") for name in ("interpreted", "interpreted_ops"))
    found = {f"branch, {name}": check for name, check in branch.CHECKS.items()} | dict(others.CHECKS)
    return {name: check for name, check in found.items() if not any(part in name for part in _OF_THE_CPU)}


def _through(card: Card, op: Callable[..., object]) -> Callable[..., object]:
    """The op on copies on the device, its results brought back; differentiable, and writing where it is to write."""

    def there(value: object) -> object:
        if isinstance(value, SparseIndex):
            return SparseIndex(value.places.to(card.device))
        if isinstance(value, PagedTiles):
            return value.to(card.device)
        return value.to(card.device) if isinstance(value, Tensor) else value

    def call(*args: object) -> object:
        copies = tree_map_only((Tensor, SparseIndex, PagedTiles), there, args)
        result = op(*copies)
        for own, copy in zip(args, copies, strict=True):
            if isinstance(own, Tensor) and isinstance(copy, Tensor) and not own.requires_grad and own.is_leaf:
                with torch.no_grad():
                    own.copy_(copy.cpu())
        return tree_map_only(Tensor, lambda x: x.cpu(), result)

    return call


def benches(card: Card, findings: Findings) -> None:
    """Every op's bench cases, in bf16: near the CPU's float64, and timed beside what the card's peaks allow."""
    for op in OPS:
        module = import_module(f"polygraft.kernels.{op}.bench")
        findings.each({op: partial(_bench, card, findings, op, module)})


def _bench(card: Card, findings: Findings, op: str, module: ModuleType) -> None:
    torch.manual_seed(0)
    peak, worst = peaks(card), 0.0
    with _made_on(card):
        cases = list(islice(module.cases(), None if card.real else 2))
    for case in cases:
        case = _of_the_public_op(case) if op == "branch" else case
        with torch.inference_mode(card.real):
            error = _error(case) if card.real else 0.0
            seconds = card.seconds(case.call, 50)
        worst = max(worst, error)
        facts: dict[str, Fact] = {"error": error, "us": 1e6 * seconds}
        if peak is not None:
            least = max(case.flops / peak[0], case.bytes / peak[1])
            facts |= {"least_us": 1e6 * least, "of_least": least / seconds}
        findings.fact(case.name, facts)
    findings.claim(f"kernels.{op}.bf16_error", worst, "rel-L2 to float64 on the CPU", "<", ROUNDED)


def _of_the_public_op(case: Case) -> Case:
    """The branch op, which a GPU has a program for, in place of what serving does on a CPU, and with values in B."""
    assert isinstance(case.call, partial)
    y, x, A, B, *rest = case.call.args
    return replace(case, call=partial(branch, x, y, A, torch.randn_like(B), *rest))


@contextmanager
def _made_on(card: Card) -> Iterator[None]:
    """Tensors that are made inside lie on the device."""
    with torch.device(card.device):
        yield


def _error(case: Case) -> float:
    """The case's result on the device against the same op's on the CPU in float64."""
    assert isinstance(case.call, partial)

    def exact(value: object) -> object:
        if isinstance(value, SparseIndex):
            return SparseIndex(value.places.cpu())
        assert isinstance(value, Tensor)
        return value.cpu().double() if value.dtype in (torch.bfloat16, torch.float32) else value.cpu()

    def own(value: object) -> object:
        return value.clone() if isinstance(value, Tensor) else value

    kinds = (Tensor, SparseIndex)
    here, there = (tree_map_only(kinds, make, case.call.args) for make in (own, exact))
    results = [case.call.func(*args) for args in (here, there)]
    found, wanted = (result if isinstance(result, Tensor) else args[0] for result, args in
                     zip(results, (here, there), strict=True))  # fmt: skip
    return relative(found, wanted)

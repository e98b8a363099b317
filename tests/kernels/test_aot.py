"""Every tuned Triton program compiled ahead of time, where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import triton.language as tl

from polygraft.kernels.affine import tuned as affine
from polygraft.kernels.branch import tuned as branch
from polygraft.kernels.branch.programs import outer_kernel, shrink_kernel
from polygraft.kernels.common import aot
from polygraft.kernels.common.aot import CARDS, Card, Facts, Tuned
from polygraft.kernels.kv import tuned as kv
from polygraft.kernels.nf4 import tuned as nf4
from polygraft.kernels.norm import tuned as norm
from polygraft.kernels.rotate import tuned as rotate
from polygraft.kernels.sparse import tuned as sparse

OPS = {
    "branch": branch.tuned,
    "affine": affine.tuned,
    "norm": norm.tuned,
    "kv": kv.tuned,
    "nf4": nf4.tuned,
    "sparse": sparse.tuned,
    "rotate": rotate.tuned,
}


def programs() -> Iterator[object]:
    for op, tuned in OPS.items():
        for each in tuned():
            yield pytest.param(each, id=f"{op}: {each.name}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


_FACTS: dict[tuple[object, str, int], Facts] = {}


def compiled(tuned: Tuned, arch: int) -> Facts:
    """The facts of a tuned program, which several tests look at, from one compilation."""
    key = tuned.program, tuned.name, arch
    if key not in _FACTS:
        _FACTS[key] = aot.compiled(tuned, arch)
    return _FACTS[key]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card.arch}")
@pytest.mark.parametrize("tuned", list(programs()))
def test_a_tuned_program_spills_nothing_fits_a_block_and_multiplies_in_tensor_cores(tuned: Tuned, card: Card) -> None:
    facts = compiled(tuned, card.arch)
    assert facts.spilled == 0
    assert facts.registers * tuned.warps * 32 <= 65536
    assert facts.shared <= card.shared
    assert bool(facts.tensor_core) == tuned.dot


@pytest.mark.parametrize(
    "tuned", [t for t in branch.tuned() if t.constants["HEIGHT"] == 64 and t.dot], ids=lambda t: t.name
)
def test_tiles_of_64_rows_use_warp_group_products_on_hopper(tuned: Tuned) -> None:
    assert compiled(tuned, 90).tensor_core == {"wgmma.mma_async"}


def test_float32_is_multiplied_in_full_precision() -> None:
    constants = {"HEIGHT": 16, "WIDTH": 64, "FEATURES": 32, "ACT": "identity", "SCALED": False, "ADD": False}
    facts = aot.compiled(Tuned("", outer_kernel, {**constants, "ACC": tl.float32}, "", 0, 0, dtype="fp32"), 90)
    assert "tf32" not in facts.ptx and "fma.rn.f32" in facts.ptx
    assert facts.spilled == 0


def test_spills_are_seen() -> None:
    large = next(each for each in kv.tuned() if each.name == "attend, 64 rows")
    assert aot.compiled(replace(large, warps=2), 80).spilled > 0


def test_the_roofline_is_the_longer_of_arithmetic_and_traffic() -> None:
    card = Card("", 80, flops=100.0, bytes=10.0, shared=0, source="")
    work = {"name": "", "program": shrink_kernel, "constants": {}, "work": ""}
    assert aot.roofline(Tuned(**work, flops=300, bytes=10), card) == 3.0
    assert aot.roofline(Tuned(**work, flops=300, bytes=70), card) == 7.0

"""The branch op's Triton kernels where no GPU is: interpreted, compiled ahead of time, and chosen for CUDA tensors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from polygraft.kernels.branch import gpu, programs
from polygraft.kernels.branch.op import branch
from tests.kernels.cases import CASES, branch_inputs

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # either default will do
ROOT = Path(__file__).parents[2]
POINTERS = {"table_ptr": "*i64", "scales_ptr": "*fp64", "tiles_ptr": "*i32"}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async"}
KERNELS = {
    "shrink": (programs.shrink_kernel, {"DEPTH": 64, "ACT": "identity", "BACKWARD": False}),
    "shrink backward": (programs.shrink_kernel, {"DEPTH": 64, "ACT": "gelu", "BACKWARD": True}),
    "expand": (programs.expand_kernel, {"FEATURES": 64, "ACT": "tanh", "SCALED": True}),
    "outer": (programs.outer_kernel, {"FEATURES": 64, "ACT": "silu", "SCALED": True, "ADD": True}),
}


def test_interpreted_kernels_equal_the_reference_and_keep_segments_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > len(CASES)
    assert not [result for result in results if result["failure"]]


@pytest.mark.parametrize("tile", [(64, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_kernels_use_tensor_cores_and_spill_nothing(
    arch: int,
    kernel: tuple[Callable[..., None], dict[str, object]],
    tile: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program, constants = kernel
    constants = {**constants, "HEIGHT": tile[0], "WIDTH": tile[1], "ACC": tl.float32}
    ptx = compiled(program, arch, "bf16", constants)
    assert TENSOR_CORE[arch] in ptx
    assert spilled_bytes(ptx, arch, tmp_path) == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_a_decoding_tile_of_16_rows_uses_tensor_cores_too(
    arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HEIGHT": 16, "WIDTH": 16, "DEPTH": 64, "ACT": "identity", "BACKWARD": False, "ACC": tl.float32}
    assert "mma" in compiled(programs.shrink_kernel, arch, "bf16", constants)


def test_float32_is_multiplied_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HEIGHT": 16, "WIDTH": 64, "FEATURES": 32, "ACT": "identity", "SCALED": False, "ADD": False}
    ptx = compiled(programs.outer_kernel, 90, "fp32", {**constants, "ACC": tl.float32})
    assert "tf32" not in ptx and "fma.rn.f32" in ptx
    assert spilled_bytes(ptx, 90, tmp_path) == 0


def test_cuda_tensors_and_only_they_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mixed ranks"]
    inputs, _ = branch_inputs(case, torch.float32)
    monkeypatch.setattr(gpu, "branch", lambda *_: "on the GPU")
    assert isinstance(branch(*inputs.values(), case.segments), torch.Tensor)
    with FakeTensorMode():
        fake = [torch.empty(tensor.shape, device="cuda") for tensor in inputs.values()]
        assert branch(*fake, case.segments) == "on the GPU"  # type: ignore[comparison-overlap]


def compiled(program: Callable[..., None], arch: int, dtype: str, constants: dict[str, object]) -> str:
    """The PTX of a kernel with 16-aligned pointers and sizes, as the launches find them for the usual widths."""
    names = program.arg_names  # type: ignore[attr-defined]
    assert constants.keys() == {name for name in names if name.isupper()}
    tensor = f"*{dtype}"
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, tensor) if name.endswith("_ptr") else "i32"
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"])


def spilled_bytes(ptx: str, arch: int, folder: Path) -> int:
    """Register spills that ptxas reports, stores and loads together."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(path), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert len(found) == 2, done.stderr
    return sum(map(int, found))

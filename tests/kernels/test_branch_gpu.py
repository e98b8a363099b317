"""The branch op's Triton kernels where no GPU is: interpreted, and chosen for CUDA tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polygraft.kernels.branch import gpu
from polygraft.kernels.branch.op import branch
from tests.kernels.cases import CASES, branch_inputs

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # either default will do
ROOT = Path(__file__).parents[2]


def test_interpreted_kernels_equal_the_reference_and_keep_segments_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > len(CASES)
    assert not [result for result in results if result["failure"]]


def test_cuda_tensors_and_only_they_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mixed ranks"]
    inputs, _ = branch_inputs(case, torch.float32)
    monkeypatch.setattr(gpu, "branch", lambda *_: "on the GPU")
    assert isinstance(branch(*inputs.values(), case.segments), torch.Tensor)  # type: ignore[arg-type,call-arg]
    with FakeTensorMode():
        fake = [torch.empty(tensor.shape, device="cuda") for tensor in inputs.values()]
        biases = torch.empty(case.stack_rows, 1, device="cuda")
        assert branch(*fake, case.segments) == "on the GPU"  # type: ignore[arg-type,call-arg]
        assert branch(*fake, case.segments, "gelu", biases) == "on the GPU"  # type: ignore[arg-type,call-arg]

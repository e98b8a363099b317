"""The Triton kernels of the other ops where no GPU is: interpreted, and chosen for CUDA tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polygraft.kernels.affine import gpu as affine_gpu
from polygraft.kernels.affine.op import affine
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv import gpu as kv_gpu
from polygraft.kernels.kv.layout import Layout, Sequence
from polygraft.kernels.kv.op import attend
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.norm import gpu as norm_gpu
from polygraft.kernels.norm.op import row_norm
from polygraft.kernels.rotate import gpu as rotate_gpu
from polygraft.kernels.rotate.op import rotate
from polygraft.kernels.rotate.rotation import Rotation
from polygraft.kernels.sparse import gpu as sparse_gpu
from polygraft.kernels.sparse.op import sparse
from polygraft.kernels.sparse.order import SparseIndex

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # either default will do
ROOT = Path(__file__).parents[2]


def test_interpreted_kernels_equal_their_references_and_keep_grafts_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_ops"], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["check"].split(",")[0] for result in results} >= {
        "affine",
        "norm",
        "kv",
        "paged",
        "nf4",
        "sparse",
        "rotate",
    }
    assert not [result for result in results if result["failure"]]


def test_cuda_tensors_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (affine_gpu, "affine"),
        (norm_gpu, "row_norm"),
        (kv_gpu, "attend"),
        (sparse_gpu, "sparse"),
        (rotate_gpu, "blocks"),
    ):
        monkeypatch.setattr(module, name, lambda *_: "on the GPU")
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
        found: list[object] = [
            affine(x, x, None, Segments((Segment(0, 4, 0, 1),))),
            row_norm(torch.empty(8, device="cuda"), x, x, x, 1.0),
            attend(x, x, x, x, x, Layout((Sequence(0, 4),), 4, 4, 1, 1), Scores(1.0)),
            sparse(x, x, x, SparseIndex(x), Segments((Segment(0, 4, 0, 1),))),
            rotate(x, {"D": x}, Rotation("blocks", 8), Segments((Segment(0, 4, 0, 8),))),
        ]
    assert found == ["on the GPU"] * 5

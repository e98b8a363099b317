"""Every op's bench runs and its work is positive; the times are of no concern here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from polygraft.kernels.common import bench
from tests.compiled import HERE

ROOT = Path(__file__).parents[2]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/bench.py") if path.parent.name != "common")


@pytest.mark.parametrize("op", OPS)
def test_a_bench_has_cases_that_run(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CALLS", 1)
    monkeypatch.setattr(bench, "WARM", 0)
    if op == "dense" and not HERE:
        pytest.skip("no AVX-512 for bf16 or no compiler on this machine")
    cases = list(import_module(f"polygraft.kernels.{op}.bench").cases())
    assert cases and all(case.flops > 0 and case.bytes > 0 for case in cases)
    bench.show(cases)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(case.name) for line, case in zip(lines, cases, strict=True)] == [True] * len(cases)

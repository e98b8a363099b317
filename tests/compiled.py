"""What tests of compiled ops need: a CPU that has products of bf16, and a compiler. In CI a skip for want of it is a
failure where the CPU could (tests/conftest.py knows it by its reason)."""

from __future__ import annotations

import pytest

from polygraft.kernels.dense.library import library

HERE = library() is not None
compiled = pytest.mark.skipif(not HERE, reason="no AVX-512 for bf16 or no compiler on this machine")

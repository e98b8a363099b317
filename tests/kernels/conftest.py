"""Every kernel test runs with uninitialised memory poisoned."""

from __future__ import annotations

import pytest

from tests.kernels.poison import poison_uninitialised


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_uninitialised(monkeypatch)

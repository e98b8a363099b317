"""How long the packs of these tests train."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[6, pytest.param(20, marks=pytest.mark.nightly)], ids=lambda steps: f"{steps} steps")
def steps(request: pytest.FixtureRequest) -> int:
    """Optimiser steps that every job takes at least."""
    return int(request.param)

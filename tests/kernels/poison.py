"""Fills with NaN what polygraft.kernels asks for uninitialised, so that reading what was never written shows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

import pytest
import torch
from torch import Tensor

PACKAGE = "polygraft.kernels"


def poison_uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` undoes it, floating memory from torch.empty and its kin called in our kernels holds NaN."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def poisoned(*args: object, **options: object) -> Tensor:
        tensor = allocate(*args, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(PACKAGE) and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned

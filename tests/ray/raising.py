"""A policy that is broken, for tests."""

from __future__ import annotations

from polygraft.cluster.actors.scaler import Scaler


class Raising(Scaler):
    def target(self, present: int, now: float) -> int:
        raise RuntimeError("this policy is broken")

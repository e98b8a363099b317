"""Adapters that are drawn anew each step, as they are served."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import functional as F

from polygraft.launch.demo.oracle.naive import Hook, after, serial
from tests.grafts.oracle.row import Row


def averaged(experts: int) -> Hook:
    """h + mean_j(W_up,j) relu(mean_i(W_down,i) h) (Wang et al. 2022, section 3.3)."""
    return after(
        lambda x, h, p: h + F.relu(h @ sum(p["A"].chunk(experts)).T / experts) @ (sum(p["B"].chunk(experts)) / experts)
    )


ROWS: Mapping[str, Row] = {
    "adapter-drop": Row("adapter-drop(6, upto=1)", hooks=lambda: {0: serial()}),
    "averaged-adapters": Row("averaged-adapters(5, experts=3)", hooks=lambda: {0: averaged(3)}),
}

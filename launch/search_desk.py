"""The search desk of the HTTP API, which imports Optuna when the first search is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from polygraft.cluster.told import Told
from polygraft.grafts.sites import ModelShape


class SearchDesk:
    """`tuning/desk.py:Desk`, carried to the ingress's process."""

    def begin(
        self,
        body: JsonValue,
        *,
        backbone: str,
        shape: ModelShape,
        quantised: bool,
        data: Path | None,
        earlier: Mapping[str, str],
    ) -> tuple[str, str, dict[str, str]]:
        from polygraft.tuning.desk import Desk

        given = {"backbone": backbone, "shape": shape, "quantised": quantised, "data": data, "earlier": earlier}
        return Desk().begin(body, **given)  # type: ignore[arg-type]

    def told(self, record: str) -> Told:
        from polygraft.tuning.desk import Desk

        return Desk().told(record)

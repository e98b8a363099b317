"""The search desk of the HTTP API, which imports Optuna when the first search is asked for."""

from __future__ import annotations

from pydantic import JsonValue

from polygraft.cluster.ground import Ground
from polygraft.cluster.told import Told


class SearchDesk:
    """`tuning/desk.py:Desk`, carried to the ingress's process."""

    def begin(self, body: JsonValue, on: Ground) -> tuple[str, str, dict[str, str]]:
        from polygraft.tuning.desk import Desk

        return Desk().begin(body, on)

    def told(self, record: str) -> Told:
        from polygraft.tuning.desk import Desk

        return Desk().told(record)

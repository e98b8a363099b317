"""The search desk of the HTTP API, which imports Optuna when the first search is asked for."""

from __future__ import annotations

from pydantic import JsonValue

from polygraft.cluster.told import Told
from polygraft.grafts.sites import ModelShape


class SearchDesk:
    """`tuning/desk.py:Desk`, carried to the ingress's process."""

    def begin(
        self, body: JsonValue, *, backbone: str, shape: ModelShape, quantised: bool
    ) -> tuple[str, str, dict[str, str]]:
        from polygraft.tuning.desk import Desk

        return Desk().begin(body, backbone=backbone, shape=shape, quantised=quantised)

    def told(self, record: str) -> Told:
        from polygraft.tuning.desk import Desk

        return Desk().told(record)

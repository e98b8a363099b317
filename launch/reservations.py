"""Gives back what dead packs have reserved, which Ray keeps for as long as the head lives.

A pack's reservation is a placement group that Ray Train makes. Train ends it with the run; when the run's processes
are killed, a cleaner of Train's does, but that one asks Ray's dashboard, which is off on one machine. What is
reserved but unused for a while has no owner.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_LOG = logging.getLogger(__name__)
_UNUSED_S = 10.0  # a new reservation is used as soon as it is granted


class Reservations:
    """Call `release` every few seconds."""

    def __init__(self, resource: str) -> None:
        self._resource = resource
        self._unused_since: dict[str, float] = {}

    def release(self, now: float) -> None:
        """Remove the groups that nobody has used for a while; `now` is monotonic, in seconds."""
        unused = _unused(self._resource)
        self._unused_since = {group: self._unused_since.get(group, now) for group in unused}
        for group, since in self._unused_since.items():
            if now - since >= _UNUSED_S:
                _LOG.warning("the reservation %s has no user; it is given back", group)
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _unused(resource: str) -> list[str]:
    """Ids of the granted groups all of whose `resource` is free."""
    free: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return [
        group
        for group, entry in placement_group_table().items()
        if entry["state"] == "CREATED"
        and (reserved := sum(bundle.get(resource, 0.0) for bundle in entry["bundles"].values()))
        and free.get(f"{resource}_group_{group}", 0.0) >= reserved
    ]

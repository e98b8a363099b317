"""Gives back the room that dead packs have reserved in Ray.

A pack's processes stand in a placement group, which Ray Train makes and ends with the run. Where its maker dies, Ray
ends the group no sooner than the whole service, and what Train has for that asks Ray's dashboard, which need not be
there. Until somebody removes the group, no other process finds its share of the device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protobuf
from ray.util.placement_group import PlacementGroup, remove_placement_group

LOG = logging.getLogger(__name__)


def give_back() -> None:
    """Remove this service's groups whose maker is dead. What fails is tried again the next time."""
    for group in _orphans():
        LOG.warning("the reservation %s has no owner any more; it is given back", group.hex())
        try:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
        except Exception:
            LOG.exception("the reservation %s is still there", group.hex())


def _orphans() -> Iterator[bytes]:
    job = ray.get_runtime_context().get_job_id()
    for told in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(told)
        ours = group.creator_job_id.hex() == job and not group.is_detached
        if ours and group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED:
            yield group.placement_group_id

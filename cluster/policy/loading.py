"""Which backbones replicas hold: those that are asked for answers, unless jobs need the memory."""

from __future__ import annotations

from polygraft.cluster.decisions import LoadBackbone, UnloadBackbone
from polygraft.cluster.model import Backbone, Snapshot
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import Reason

RESTS_S = 150.0  # a backbone that is asked is said to be at least every minute


def is_wanted(backbone: Backbone, *, now: float, unload_s: float) -> bool:
    """Whether it was asked within the last `unload_s` seconds; 0: at any time."""
    return backbone.asked_at > 0 and (unload_s == 0 or now - backbone.asked_at < unload_s)


def loading(snapshot: Snapshot, standing: Standing) -> tuple[LoadBackbone | UnloadBackbone, ...]:
    """What brings the backbones to what is wanted, by name. Where a job waits for a device, the one that was asked
    longest ago makes room, if nobody asks it now. `standing` is that of the snapshot's jobs."""
    now, unload_s = snapshot.now, snapshot.limits.unload_s
    present = [backbone for _, backbone in sorted(snapshot.backbones.items())]
    wanted = {one.name: is_wanted(one, now=now, unload_s=unload_s) for one in present}
    loads = [LoadBackbone(one.name) for one in present if wanted[one.name] and not one.loaded]
    unloads = [UnloadBackbone(one.name, one.asked_at) for one in present if one.loaded and not wanted[one.name]]
    if not unloads and any(job.reason is Reason.NO_DEVICE for job in standing.restless.values()):
        resting = [one for one in present if one.loaded and now - one.asked_at >= RESTS_S]
        first = sorted(resting, key=lambda one: (one.asked_at, one.name))[:1]
        unloads = [UnloadBackbone(one.name, one.asked_at, Reason.NO_DEVICE) for one in first]
    return (*loads, *unloads)

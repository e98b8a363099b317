"""Which backbones replicas hold: those that are asked for answers."""

from __future__ import annotations

from polygraft.cluster.decisions import LoadBackbone, UnloadBackbone
from polygraft.cluster.model import Backbone, Snapshot


def is_wanted(backbone: Backbone, *, now: float, unload_s: float) -> bool:
    """Whether it was asked within the last `unload_s` seconds; 0: at any time."""
    return backbone.asked_at > 0 and (unload_s == 0 or now - backbone.asked_at < unload_s)


def loading(snapshot: Snapshot) -> tuple[LoadBackbone | UnloadBackbone, ...]:
    """What brings the backbones to what is wanted, by name."""
    found: list[LoadBackbone | UnloadBackbone] = []
    for name, backbone in sorted(snapshot.backbones.items()):
        wanted = is_wanted(backbone, now=snapshot.now, unload_s=snapshot.limits.unload_s)
        if wanted != backbone.loaded:
            found.append(LoadBackbone(name) if wanted else UnloadBackbone(name))
    return tuple(found)

"""What a config may ask of a class that a flat batch of many sequences cannot give it."""

from __future__ import annotations

from polygraft.grafts.architectures.declare import Config


def rotary(config: Config) -> str | None:
    """Angles that depend on the longest sequence of a batch would make a row's numbers depend on its neighbours."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = parameters.values() if isinstance(parameters, dict) else ()
    for each in (parameters, *by_layer):
        kind = each.get("rope_type", each.get("type")) if isinstance(each, dict) else None
        if kind in ("dynamic", "longrope"):
            return f"rope_type: {kind!r} makes a row's angles depend on other rows; use a backbone with fixed angles"
    return None

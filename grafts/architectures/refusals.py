"""What a config may ask of a class that a flat batch of many sequences cannot give it."""

from __future__ import annotations

from polygraft.grafts.architectures.declare import Config


def rotary(config: Config) -> str | None:
    """Angles that depend on the longest sequence of a batch would make a row's numbers depend on its neighbours."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type")) if isinstance(parameters, dict) else None
    if kind in ("dynamic", "longrope"):
        return f"rope_type: {kind!r} turns a row by angles that depend on other rows; use a backbone with fixed angles"
    return None


def windowed(config: Config) -> str | None:
    """Every row sees its whole sequence; a window as long as the sequences are hides nothing."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window < longest and _uses(config):
        return (
            f"sliding_window: {window} hides a part of sequences of up to {longest} tokens, which is not done here; "
            f"set max_position_embeddings to {window} in config.json to use the backbone for shorter ones"
        )
    return rotary(config)


def _uses(config: Config) -> bool:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return "sliding_attention" in kinds
    return bool(config.get("use_sliding_window", True))

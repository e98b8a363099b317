"""Random streams: the number that dropout masks and noise at a site are hashed with."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

from polygraft.grafts.runtime.keys import BranchKey, NoisyKey
from polygraft.grafts.sites import Site

# The name of every stream of a site. Whatever becomes of keys and their fields, these names stay: a job that is
# resumed must draw what it would have drawn.
STREAMS: Mapping[BranchKey | NoisyKey, str] = {
    BranchKey("input", "identity"): "input.identity",
    BranchKey("input", "identity", bias=True): "input.identity.a",
    BranchKey("input", "relu"): "input.relu",
    BranchKey("input", "relu", bias=True): "input.relu.a",
    BranchKey("input", "gelu"): "input.gelu",
    BranchKey("input", "gelu", bias=True): "input.gelu.a",
    BranchKey("input", "silu"): "input.silu",
    BranchKey("input", "silu", bias=True): "input.silu.a",
    BranchKey("input", "tanh"): "input.tanh",
    BranchKey("input", "tanh", bias=True): "input.tanh.a",
    BranchKey("output", "identity"): "output.identity",
    BranchKey("output", "identity", bias=True): "output.identity.a",
    BranchKey("output", "relu"): "output.relu",
    BranchKey("output", "relu", bias=True): "output.relu.a",
    BranchKey("output", "gelu"): "output.gelu",
    BranchKey("output", "gelu", bias=True): "output.gelu.a",
    BranchKey("output", "silu"): "output.silu",
    BranchKey("output", "silu", bias=True): "output.silu.a",
    BranchKey("output", "tanh"): "output.tanh",
    BranchKey("output", "tanh", bias=True): "output.tanh.a",
    NoisyKey("input"): "input.identity.noise.0.0",
    NoisyKey("output"): "output.identity.noise.0.0",
}


def stream(site: Site, key: BranchKey | NoisyKey) -> int:
    """A 32-bit signed number."""
    return crc32(f"{site}.{STREAMS[key]}".encode()) - (1 << 31)

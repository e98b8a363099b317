"""How large one thing may be that a pack or a replica of a backbone makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """A size of a backbone's packs or replicas, by the name of its setting: what follows from the devices, and what is
    used, since a setting was given."""

    name: str
    derived: int
    used: int

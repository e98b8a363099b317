"""The devices of a Ray that has just started, once their speed is known. Where none is there yet, the controller gives
the backbones their sizes when the first one is (`cluster/actors/controller.py`)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from polygraft.cluster.actors.discovery import Discovery
from polygraft.cluster.model import Device
from polygraft.launch.scout import NodeScout

_WAIT_S = 30.0
_LOOK_S = 0.1


def measured_devices(scout: NodeScout) -> Sequence[Device]:
    """Of the nodes that are there now; where one cannot be measured in half a minute, as it is known."""
    discovery, end = Discovery(scout, list_s=_LOOK_S), time.monotonic() + _WAIT_S
    devices = discovery.devices()
    while discovery.measuring and time.monotonic() < end:
        time.sleep(_LOOK_S)
        devices = discovery.devices()
    return devices

"""How the controller gives a backbone its sizes that was added where no device was known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from polygraft.cluster.model import Backbone, Device
from polygraft.cluster.settings import Settings
from polygraft.cluster.size import Size
from polygraft.cluster.sizing import sizes


@dataclass(frozen=True, slots=True)
class SizeBackbone:
    """Called in the controller's process, to which it travels."""

    settings: str  # JSON, since a settings model read again would take in that process's environment

    @staticmethod
    def of(settings: Settings) -> SizeBackbone:
        return SizeBackbone(settings.told)

    def __call__(self, backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
        """Raises DoesNotFit."""
        return sizes(Settings.model_validate_json(self.settings), backbone, devices)

"""How the controller opens a pack: as a host actor of trainers, told where everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ray.actor import ActorHandle

from polygraft.cluster.actors.effects import PackHost
from polygraft.cluster.model import Pack
from polygraft.cluster.settings import Settings


@dataclass(frozen=True, slots=True)
class OpenHost:
    """Called in the controller's process, to which it travels; torch is imported there only when the first pack
    opens."""

    settings: str  # JSON, since a settings model read again would take in that process's environment
    backbone_folder: str

    @staticmethod
    def of(settings: Settings, backbone_folder: Path) -> OpenHost:
        return OpenHost(settings.model_dump_json(), str(backbone_folder))

    def __call__(self, pack: Pack) -> ActorHandle[PackHost]:
        from polygraft.trainers.host import PackPlan, start_host

        settings = Settings.model_validate_json(self.settings)
        plan = PackPlan(
            pack=pack.id,
            backbone_folder=self.backbone_folder,
            store_url=settings.store_url,
            data=str(settings.data),
            device=settings.device,
            dtype=settings.dtype,
            quantise=settings.quantise,
            max_rows=settings.pack.max_rows,
            micro_rows=settings.pack.micro_rows,
            max_bytes=settings.pack.memory_bytes or 0,
        )
        return cast("ActorHandle[PackHost]", start_host(plan))

"""How the controller opens a pack: as a host actor of trainers, told where everything lies."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import cast

from ray.actor import ActorHandle

from polygraft.cluster.actors.effects import PackHost
from polygraft.cluster.model import Pack
from polygraft.cluster.settings import Settings
from polygraft.cluster.sizing import fitted
from polygraft.cluster.store import keys
from polygraft.cluster.store.connect import connect


@dataclass(frozen=True, slots=True)
class OpenHost:
    """Called in the controller's process, to which it travels."""

    settings: str  # JSON, since a settings model read again would take in that process's environment

    @staticmethod
    def of(settings: Settings) -> OpenHost:
        return OpenHost(settings.told)

    def __call__(self, pack: Pack) -> ActorHandle[PackHost]:
        """Raises LookupError where the pack's backbone was removed meanwhile, or one of its devices is gone."""
        from polygraft.trainers.host import start_host
        from polygraft.trainers.plan import PackPlan

        settings = Settings.model_validate_json(self.settings)
        with closing(connect(settings.store_url)) as store:
            found = store.get(keys.backbone(pack.backbone))
            places = [store.get(keys.device(device)) for device in pack.devices]
        if found is None:
            raise LookupError(f"the backbone {pack.backbone} was removed")
        devices = [one.value.device for one in places if one is not None]
        if len(devices) < len(pack.devices):
            raise LookupError(f"a device of {', '.join(pack.devices)} is gone")
        settings = fitted(settings, found.value)
        plan = PackPlan(
            pack=pack.id,
            nodes=tuple(device.node for device in devices),
            kind=devices[0].kind,
            cores=min(device.cores for device in devices),
            backbone_folder=found.value.folder,
            store_url=settings.store_url,
            data=str(settings.data),
            device=settings.device,
            dtype=found.value.dtype,
            quantise=found.value.quantise,
            max_rows=settings.pack.max_rows,
            micro_rows=settings.pack.micro_rows,
            max_bytes=settings.pack.memory_bytes or 0,
            step_floor_s=settings.step_floor_s,
            silent_s=settings.pack.silent_s,
        )
        return cast("ActorHandle[PackHost]", start_host(plan))

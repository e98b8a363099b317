"""What the commands share: the flags before the command's name, and the service these flags lead to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from polygraft.cluster.client import Client
from polygraft.cluster.service import ServiceNotRunning, find_service, read_key
from polygraft.cluster.settings import Settings, load
from polygraft.cluster.store.base import Store
from polygraft.launch.output import Failure, Status

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True, slots=True)
class Flags:
    home: Path | None = None
    url: str | None = None
    key: str | None = None

    def settings(self, **flags: object) -> Settings:
        """Raises BadSettings."""
        return load(home=self.home, **flags)

    def client(self) -> Client:
        """Raises ServiceNotRunning."""
        settings = self.settings()
        url = self.url or find_service(settings.service_path).url
        return Client(url.rstrip("/").removesuffix("/v1"), self.key or read_key(settings.api_key_path))

    def backbone(self, name: str | None, fingerprint: str | None = None) -> tuple[str, str | None]:
        """Where a backbone lies, and how it is quantised: one of the running service by its name, else by its
        fingerprint, else the service's own. A name that it has not is a folder or hub id, quantised as its own; where
        no service runs, the settings say the rest. Raises BadSettings."""
        settings = self.settings()
        try:
            with self.client() as client:
                found = client.backbones()
        except ServiceNotRunning:
            return name or settings.backbone, settings.quantise
        own = next(one for one in found if one.default)
        if name is not None:
            meant = next((one for one in found if one.id == name), None)
        else:
            meant = next((one for one in found if one.fingerprint == fingerprint), own)
        if meant is None:
            return name or own.id, own.quantise
        if meant.path is None:
            raise Failure(f"where the backbone {meant.id} lies is told to the operator alone; name its folder")
        return meant.path, meant.quantise

    def store(self) -> Store:
        """The store that the settings name, else that of the service under the home folder. Raises
        ServiceNotRunning."""
        if self.url:
            raise Failure("this command works on the store of a local service; leave out --url", Status.USAGE)
        from polygraft.cluster.store.connect import connect

        settings = self.settings()
        embedded = settings.store_url == "embedded"
        return connect(find_service(settings.service_path).store_url if embedded else settings.store_url)


def flags(context: typer.Context) -> Flags:
    found = context.find_object(Flags)
    assert found is not None  # the root callback ran
    return found

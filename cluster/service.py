"""How a running service is found: `run/service.json` in the home folder, written by its head once it answers, and the
local tenant's key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from polygraft.kernels.common.atomic import make_folder, write_text


class ServiceNotRunning(Exception):
    """There is no service under this home folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service that is up. `pid` and `started` (seconds since 1970) name its supervisor.

    `ray_token` is the file with the secret of Ray's own ports; `backbone` is the model's id and `backbone_folder`
    where it lies.
    """

    url: str
    backbone: str
    backbone_folder: str
    store_url: str
    ray_address: str
    ray_namespace: str
    ray_token: str
    pid: int
    started: float


def find_service(path: Path) -> Service:
    """Reads Settings.service_path. Raises ServiceNotRunning when there is none, or it was written by another
    version."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise ServiceNotRunning(
            f"no service is running under {path.parents[1]}; start one with: polygraft up"
        ) from None
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(Service)}:
        raise ServiceNotRunning(
            f"{path} is not of this version; stop that service with its own version, or remove the file"
        )
    return Service(**record)


def announce(path: Path, service: Service) -> None:
    """Write the file; readable by its owner only, as the store's password is in it."""
    write_private(path, json.dumps(asdict(service), indent=2))


def read_key(path: Path) -> str:
    """Reads Settings.api_key_path, the local tenant's API key. Raises ServiceNotRunning when no `up` has made one
    yet."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise ServiceNotRunning(f"{path} is missing; the first `polygraft up` makes it") from None


def write_private(path: Path, text: str) -> None:
    """Replace the file whole, with mode 0600 from its first byte on."""
    make_folder(path.parent, mode=0o700)
    write_text(path, text, mode=0o600)

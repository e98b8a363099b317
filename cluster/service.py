"""How a running service is found: `<home>/run/service.json`, written by its head once it answers, and the local tenant's key."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path


class ServiceNotRunning(Exception):
    """There is no service under this home folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service that is up. `pid` and `started` (seconds since 1970) name its supervisor; `ray_token` is a file, for Ray's own ports."""

    url: str
    store_url: str
    ray_address: str
    ray_namespace: str
    ray_token: str
    pid: int
    started: float


def service_file(home: Path) -> Path:
    return home / "run" / "service.json"


def key_file(home: Path) -> Path:
    return home / "api_key"


def find_service(home: Path) -> Service:
    """Raises ServiceNotRunning when none is up here, or the file was written by another version."""
    try:
        record = json.loads(service_file(home).read_text())
    except FileNotFoundError:
        raise ServiceNotRunning(f"no service is running under {home}; start one with: polygraft up") from None
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(Service)}:
        raise ServiceNotRunning(f"{service_file(home)} is not of this version; stop that service with its own version, or remove the file")
    return Service(**record)


def announce(home: Path, service: Service) -> None:
    """Write the file; readable by its owner only, as the store's password is in it."""
    write_private(service_file(home), json.dumps(asdict(service), indent=2))


def read_key(home: Path) -> str:
    """The local tenant's API key. Raises ServiceNotRunning when the first `up` has not made one yet."""
    try:
        return key_file(home).read_text().strip()
    except FileNotFoundError:
        raise ServiceNotRunning(f"{key_file(home)} is missing; `polygraft up` makes it") from None


def write_private(path: Path, text: str) -> None:
    """Replace the file whole, with mode 0600 from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

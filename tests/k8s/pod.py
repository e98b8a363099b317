"""The environment that a Ray pod of the manifests has, on this machine: its Secrets and volumes are folders of a
test's."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import yaml

BASE = Path(__file__).parents[2] / "k8s" / "base"
# What Kubernetes adds for a Service that is called polygraft, unless the pod says enableServiceLinks: false.
SERVICE_LINKS = {
    "POLYGRAFT_PORT": "tcp://10.0.0.1:8000",
    "POLYGRAFT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "POLYGRAFT_PORT_8000_TCP_ADDR": "10.0.0.1",
    "POLYGRAFT_PORT_8000_TCP_PORT": "8000",
    "POLYGRAFT_PORT_8000_TCP_PROTO": "tcp",
    "POLYGRAFT_SERVICE_HOST": "10.0.0.1",
    "POLYGRAFT_SERVICE_PORT": "8000",
}


class Pod:
    """The head's container; `store_url` is that of the server that stands for the manifests' store."""

    def __init__(self, folder: Path, store_url: str) -> None:
        (service,) = yaml.safe_load_all((BASE / "ray-service.yaml").read_text())
        spec = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
        (self._container,) = spec["containers"]
        self._folder, self._store = folder, urlsplit(store_url)
        self._volumes = {volume["name"]: volume for volume in spec["volumes"]}
        self.key = f"pg-{'a' * 32}"
        self.write_key(self.key)

    def write_key(self, text: str) -> None:
        """The Secret polygraft-api-key, as README.md has it made."""
        (mount,) = (
            one["mountPath"]
            for one in self._container["volumeMounts"]
            if self._volumes[one["name"]].get("secret", {}).get("secretName") == "polygraft-api-key"
        )
        folder = self._here(mount)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for one in self._container["env"]:
            value = one.get("value")
            if value is None:
                assert one["valueFrom"]["secretKeyRef"] == {"name": "polygraft-valkey", "key": "password"}
                value = str(self._store.password)
            for name, known in found.items():
                value = value.replace(f"$({name})", known)
            found[one["name"]] = self._moved(value)
        return found

    def _moved(self, value: str) -> str:
        value = value.replace("@polygraft-valkey:6379", f"@{self._store.hostname}:{self._store.port}")
        for mount in self._container["volumeMounts"]:
            if value.startswith(mount["mountPath"]):
                return str(self._here(mount["mountPath"])) + value.removeprefix(mount["mountPath"])
        return value

    def _here(self, path: str) -> Path:
        return self._folder / path.lstrip("/")

"""A node behind a wire of its own that may be cut: a network namespace at a bridge. A wire that is cut loses everything
and says nothing; who sends something waits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

HEAD, NODE = "10.213.47.1", "10.213.47.2"


@dataclass(frozen=True)
class Wire:
    """`namespace` is where the node is, `end` the near end of its wire."""

    namespace: str
    bridge: str
    end: str

    def cut(self) -> None:
        _ip("link", "set", self.end, "nomaster")

    def mend(self) -> None:
        _ip("link", "set", self.end, "master", self.bridge)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A program behind the wire."""
        behind = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.Popen(behind, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_ray(self, address: str, *, devices: int, memory: int) -> subprocess.Popen[bytes]:
        """A node of the Ray at `address`, until its first process ends."""
        return self.start(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            f"--address={address}",
            f"--node-ip-address={NODE}",
            "--num-cpus=2",
            f'--resources={{"device": {devices}}}',
            f"--memory={memory}",
            f"--object-store-memory={100 << 20}",
        )


@contextmanager
def wire() -> Iterator[Wire]:
    """Skips the test where this process may not make one."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    made = Wire(f"pg{os.getpid()}", f"pgb{os.getpid()}", f"pgw{os.getpid()}")
    far = f"pgf{os.getpid()}"
    try:
        _ip("netns", "add", made.namespace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        _ip("addr", "add", f"{HEAD}/24", "dev", made.bridge)
        _ip("link", "set", made.bridge, "up")
        _ip("link", "add", made.end, "type", "veth", "peer", "name", far, "netns", made.namespace)
        made.mend()
        _ip("link", "set", made.end, "up")
        for inside in (f"addr add {NODE}/24 dev {far}", f"link set {far} up", "link set lo up"):
            _ip("-n", made.namespace, *inside.split())
        yield made
    finally:
        for undone in (f"link del {made.end}", f"link del {made.bridge}", f"netns del {made.namespace}"):
            subprocess.run(["ip", *undone.split()], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)

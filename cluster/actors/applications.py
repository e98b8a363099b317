"""The Serve applications that hold replicas, one a backbone: a thread brings them to what is wanted, since Serve takes
its time.

They are made by `serve.run`, which a declarative configuration neither lists nor ends: a RayService's names the ingress
alone, and applying it again leaves the backbones as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from threading import Event, Thread

from ray import serve
from ray.serve.schema import ApplicationStatus

from polygraft.cluster.model import Backbone

LOG = logging.getLogger(__name__)
PREFIX = "backbone-"
ENGINE = "engine"  # the deployment of each
LOOK_S = 2.0
CALM_S = 10.0  # to the next look where all is as it should be: Serve tells all it knows, which costs both ends 20 ms
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

# Makes the application of a backbone, or brings the one that is there to what the record says; a call that changes
# nothing disturbs no replica. It does not wait for replicas.
Deploy = Callable[[Backbone], None]


def application_name(backbone: str) -> str:
    """backbone-NAME; of a name that is a path or a hub's, the last part and a digest of all."""
    if _PLAIN.fullmatch(backbone):
        return f"{PREFIX}{backbone}"
    last = re.sub(r"[^A-Za-z0-9._-]", "-", backbone.rstrip("/").rpartition("/")[2])
    return f"{PREFIX}{last[:40]}-{sha256(backbone.encode()).hexdigest()[:8]}"


class Applications:
    """All under `PREFIX` in the Serve of this Ray. What fails is tried again at the next look."""

    def __init__(self, deploy: Deploy) -> None:
        self._deploy = deploy
        self._wanted: Mapping[str, Backbone] = {}
        self._deployed: dict[str, tuple[object, ...]] = {}
        self._changed = Event()
        self._thread: Thread | None = None

    def want(self, backbones: Collection[Backbone]) -> None:
        """These and no others; returns at once."""
        before = {name: _built_of(backbone) for name, backbone in self._wanted.items()}
        self._wanted = {application_name(backbone.name): backbone for backbone in backbones}
        if self._thread is None:
            self._thread = Thread(target=self._run, name="applications", daemon=True)
            self._thread.start()
        if before != {name: _built_of(backbone) for name, backbone in self._wanted.items()}:
            self._changed.set()

    def _run(self) -> None:
        while True:
            calm = False
            try:
                calm = self._reconcile(self._wanted)
            except Exception:
                LOG.exception("the applications of backbones are not as they should be")
            self._changed.wait(CALM_S if calm else LOOK_S)
            self._changed.clear()

    def _reconcile(self, wanted: Mapping[str, Backbone]) -> bool:
        """Whether there was nothing to do."""
        status = serve.status()
        if not status.applications:  # not even the ingress: Serve is not up, and to call it now would start another
            return False
        calm = True
        present = {
            name
            for name, application in status.applications.items()
            if name.startswith(PREFIX) and application.status is not ApplicationStatus.DELETING
        }
        for name in sorted(present - wanted.keys()):
            calm = False
            LOG.info("ending %s", name)
            self._deployed.pop(name, None)
            serve.delete(name, _blocking=False)
        for name, backbone in sorted(wanted.items()):
            if name not in present or self._deployed.get(name) != _built_of(backbone):
                calm = False
                LOG.info("deploying %s", name)
                self._deploy(backbone)
                self._deployed[name] = _built_of(backbone)
        return calm


def _built_of(backbone: Backbone) -> tuple[object, ...]:
    return backbone.folder, backbone.dtype, backbone.quantise, backbone.fingerprint, backbone.sizes

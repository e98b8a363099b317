"""Bursts of the material's prompts through our engine, in this process and without Ray."""

from __future__ import annotations

from pathlib import Path
from threading import Event

from material import GRAFTS, Material

from polygraft.cluster.model import GraftId, ReplicaId, TenantId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.engine import Engine
from polygraft.serving.messages import Load, StepTokens
from polygraft.serving.request import GenerationRequest

_PATIENCE_S = 900.0


class Burst:
    """An engine with the service's own settings, without a prefix cache, whose thread runs, and what its one listener
    heard."""

    def __init__(self, backbone: Backbone, material: Material) -> None:
        self._material, self._bursts, self._over = material, 0, Event()
        self._said: dict[str, list[int]] = {}
        self._open: set[str] = set()
        self._errors: list[str] = []
        data = Path(material.folder)
        settings = ServeSettings(prefix_cache=False)  # the same prompts come again, and are computed each time
        self._engine = Engine(backbone, settings, replica=ReplicaId("benchmark"), data=data)
        self._engine.listen("", self._hear)
        self._engine.start()

    def run(self, count: int, *, grafts: bool) -> list[list[int]]:
        """Greedy continuations of all prompts by `count` tokens, submitted together; stream i is on graft i mod 8.

        Raises RuntimeError when one ends otherwise.
        """
        self._bursts += 1
        requests = [
            GenerationRequest(
                id=f"{self._bursts}/{stream}",
                tenant=TenantId("benchmark"),
                graft=GraftId(self._material.grafts[stream % GRAFTS]) if grafts else None,
                prompt_ids=prompt,
                max_tokens=count,
                temperature=0.0,
            )
            for stream, prompt in enumerate(self._material.prompts)
        ]
        self._over.clear()
        self._said = {request.id: [] for request in requests}
        self._open = set(self._said)
        refused = [request.id for request in requests if self._engine.submit(request) is not None]
        if refused or not self._over.wait(_PATIENCE_S) or self._errors:
            raise RuntimeError(f"refused {refused}, still open {sorted(self._open)}, errors {self._errors}")
        return list(self._said.values())

    def close(self) -> None:
        self._engine.stop()

    def _hear(self, step: tuple[StepTokens, ...], _: Load) -> None:
        for said in step:
            if said.token is not None:
                self._said[said.request].append(said.token)
            if said.finish_reason is not None:
                self._open.discard(said.request)
                if said.finish_reason != "length":
                    self._errors.append(f"{said.request}: {said.finish_reason} {said.error or ''}")
        if not self._open:
            self._over.set()

"""The arms of the serving benchmark, each in a process of its own. A round is one burst of streams."""

from __future__ import annotations

from pathlib import Path

import torch
from assignment import Task
from child import Round, Worker, task, timed, work
from limits import Ceiling
from material import PROMPTS, Material
from serving_engine import Burst

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import in_own_thread, lean_imports

_WARM_TOKENS = 4


class Ours:
    """The engine with its own thread, every stream on its graft or all on the bare backbone."""

    def __init__(self, given: Task, *, grafts: bool) -> None:
        self._task, self._material, self._grafts = given, Material.read(given.folder), grafts

    def load(self) -> str:
        self._backbone, self._burst = in_own_thread(self._made)
        self._burst.run(1, grafts=False)
        return str(self._backbone.dtype).removeprefix("torch.")

    def _made(self) -> tuple[Backbone, Burst]:
        with lean_imports():
            backbone = Backbone.load(Path(self._material.backbone))
        return backbone, Burst(backbone, self._material)

    def warm(self) -> None:
        self._burst.run(_WARM_TOKENS, grafts=self._grafts)

    def round(self) -> Round:
        return timed(lambda: sum(map(len, self._burst.run(self._task.size, grafts=self._grafts))))


def arm(given: Task) -> Worker:
    match given.kind:
        case "engine" | "engine_bare":
            return Ours(given, grafts=given.kind == "engine")
        case "generate" | "generate_bare":
            from serving_rivals import Generate

            return Generate(given, grafts=given.kind == "generate")
        case "ceiling":
            return Ceiling(Material.read(given.folder), rows=PROMPTS, passes=given.size, backward=False)
        case other:
            raise ValueError(f"no arm {other!r}")


if __name__ == "__main__":
    torch.set_num_threads(task().threads)
    work(arm(task()))

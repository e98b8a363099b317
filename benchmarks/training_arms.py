"""The arms of the training benchmark, each in a process of its own."""

from __future__ import annotations

import torch
from assignment import Task
from child import Round, Worker, task, timed, work
from limits import Ceiling
from material import TRAIN_TOKENS, Material
from training_jobs import backbone_of, pack

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import best_dtype
from polygraft.grafts.runtime.process import lean_imports
from polygraft.grafts.runtime.route import Rows

_WARM_STEPS = 3


class Packed:
    """Ours: all jobs in one pack."""

    def __init__(self, given: Task) -> None:
        self._task, self._material = given, Material.read(given.folder)

    def load(self) -> str:
        with lean_imports():
            self._backbone = backbone_of(self._material, best_dtype())
        prompt = torch.tensor(self._material.prompts[0])
        whole = WholeSequences(((0, len(prompt)),), self._backbone.shape)
        with torch.inference_mode():
            self._backbone.forward(Rows(prompt, torch.arange(len(prompt)), ()), self._backbone.stacks(()), whole)
        return str(self._backbone.dtype).removeprefix("torch.")

    def warm(self) -> None:
        self._runner = pack(self._backbone, self._material, self._task.jobs)
        self._steps(_WARM_STEPS)

    def round(self) -> Round:
        return timed(lambda: self._steps(self._task.size))

    def _steps(self, count: int) -> int:
        for _ in range(count):
            done = self._runner.step()
            assert len(done.stepped) == len(self._task.jobs) and not done.failed
        return count * len(self._task.jobs) * TRAIN_TOKENS


def arm(given: Task) -> Worker:
    match given.kind:
        case "packed":
            return Packed(given)
        case "in_turn" | "switching":
            from training_rivals import InTurn, Switching

            return InTurn(given) if given.kind == "in_turn" else Switching(given)
        case "ceiling":
            rows = len(given.jobs) * TRAIN_TOKENS
            return Ceiling(Material.read(given.folder), rows=rows, passes=given.size, backward=True)
        case other:
            raise ValueError(f"no arm {other!r}")


if __name__ == "__main__":
    torch.set_num_threads(task().threads)
    work(arm(task()))

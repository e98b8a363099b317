"""Runs every writer of files that must be whole and kills it before each of its steps; run as a script by
test_durability.py, so that the processes that it forks carry nothing of pytest."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import TypedDict

import torch

from polygraft.cluster.service import write_private
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import gguf_lora, native
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.sites import ModelShape
from polygraft.kernels.common.atomic import move, sync, whole_file, whole_folder, write_text
from polygraft.trainers import checkpoint
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.running import RunningJob

# What Python reports of a writer's steps on files; fsync is reported by `_run_until`.
STEPS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir"}
SHAPE = ModelShape("llama", layers=1, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=16)
LORA = BoundGraft(parse("lora(r=2, at=attn.q)"), SHAPE)
VALUES = {tensor.name: torch.ones(tensor.shape) for tensor in LORA.tensors}
JOB = TrainJob("job", LORA, TrainConfig(epochs=1, batch_size=1, learning_rate=1e-3), (Sample((1, 2), (0.0, 1.0)),))

Tree = dict[str, str]  # the files that can be seen in a folder: path in it, and bytes in hexadecimal
Write = Callable[[Path], object]


def _file(folder: Path, text: str) -> None:
    with whole_file(folder / "file") as draft, draft.open("w") as file:
        file.write(text[:1])
        file.flush()
        sync(draft)  # a step between the halves
        file.write(text[1:])


def _folder(folder: Path) -> None:
    with whole_folder(folder / "parents" / "folder") as draft:
        (draft / "below").mkdir()
        (draft / "below" / "one").write_text("1")
        (draft / "two").write_text("2")


def _move(folder: Path, text: str) -> None:
    (folder / ".received").write_text(text)
    move(folder / ".received", folder / "kept")


def _checkpoint(folder: Path, step: int) -> None:
    checkpoint.save(folder, RunningJob(JOB, Slab(LORA), step=step), named=f"checkpoint-{1:08d}")


def _gguf(folder: Path) -> None:
    if not (target := folder / "lora.gguf").exists():  # else refused
        gguf_lora.export(target, LORA, VALUES)


# By name: what makes the folder that a writer finds, or None, and the writer.
WRITERS: Mapping[str, tuple[Write | None, Write]] = {
    "a file": (lambda at: _file(at, "old"), lambda at: _file(at, "new")),
    "a text": (lambda at: write_text(at / "text", "old"), lambda at: write_text(at / "text", "new")),
    "a folder": (None, _folder),
    "a file that was received": (lambda at: _move(at, "old"), lambda at: _move(at, "new")),
    "a checkpoint": (lambda at: _checkpoint(at, 1), lambda at: _checkpoint(at, 2)),
    "a manifest": (lambda at: Manifest(step=1).save(at), lambda at: Manifest(step=2, jobs={"job": None}).save(at)),
    "a graft": (None, lambda at: native.save(at, LORA, VALUES, backbone="stock")),
    "a GGUF file": (None, _gguf),
    "a private file": (lambda at: write_private(at / "key", "old"), lambda at: write_private(at / "key", "new")),
}


class Killed(TypedDict):
    """`before` and `after` are what is seen without a kill; `killed` what is seen after each kill, in the order of the
    steps; `again` what is seen where the same was written once more after a kill."""

    writer: str
    before: Tree
    after: Tree
    killed: list[Tree]
    again: list[Tree]


def seen(folder: Path) -> Tree:
    """Hidden names are drafts, which no reader looks at."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder): path for path in files}
    return {str(name): path.read_bytes().hex() for name, path in found.items() if "/." not in f"/{name}"}


def kill_before_each_step(writer: str, root: Path) -> Killed:
    before, write = WRITERS[writer]
    killed: list[Tree] = []
    again: list[Tree] = []
    for step in count():
        folder = root / str(step)
        folder.mkdir()
        if before is not None:
            before(folder)
        old = seen(folder)
        ended = _run_until(step, write, folder)
        killed.append(seen(folder))
        if ended:
            after = killed.pop()
            return {"writer": writer, "before": old, "after": after, "killed": killed, "again": again}
        if step % 3 == 1:
            assert _run_until(None, write, folder)
            again.append(seen(folder))
    raise AssertionError("unreachable")


def _run_until(step: int | None, write: Write, folder: Path) -> bool:
    """Run the writer in a process of its own, which dies before step number `step`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        numbers = count()

        def take() -> None:
            if next(numbers) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event in STEPS and str(folder) in str(arguments[0]):
                take()

        def fsync(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
            take()
            fsync(handle)

        os.fsync = fsync  # type: ignore[assignment]
        sys.addaudithook(watch)
        try:
            write(folder)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the writer failed: {status}"
    return status == 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no other threads
    for name in WRITERS:
        root = Path(sys.argv[1]) / name
        root.mkdir()
        print(json.dumps(kill_before_each_step(name, root)))
